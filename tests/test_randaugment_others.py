"""docs/augmentation.md says what magnitudes mean, here and in other libraries: its tables are derived again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import InterpolationMode, RandAugment

from prelora.data.randaugment import FILL, OPS, drawn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "augmentation.md"
MAGNITUDES = (0, 5, 10, 15, 20)
SIZE = 224


def table(first_column: str) -> dict[str, dict[str, str]]:
    """The page's table whose first column has this head: cells by row and column."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def strength(op: str, magnitude: float) -> float:
    """What the first table gives for an operation."""
    args = drawn(op, magnitude, SIZE, centre=(SIZE // 2, SIZE // 2))[1:]
    match op:
        case "Rotate":
            return float(np.degrees(np.arccos(args[0])))
        case "ShearX":
            return args[1]
        case "ShearY":
            return args[3]
        case "TranslateX":
            return args[2]
        case "TranslateY":
            return args[5]
        case "Cutout":
            return args[2]
        case "Posterize":
            return bin(int(args[0])).count("1")
        case _:
            return args[0]


@pytest.mark.parametrize("row", table("operation"))
def test_the_levels_are_those_that_are_drawn(row: str) -> None:
    for op in row.split(", "):
        assert [f"{strength(op, m):.3g}" for m in MAGNITUDES] == [table("operation")[row][str(m)] for m in MAGNITUDES]


def test_the_levels_are_given_for_every_operation_that_has_one() -> None:
    named = {op for row in table("operation") for op in row.split(", ")}
    assert named | {"AutoContrast", "Equalize", "Invert"} == set(OPS)


def yes(found: bool) -> str:
    return "yes" if found else "none"


def ours() -> dict[str, str]:
    """Ours at magnitude 15, in the words of the second table."""
    at_15 = {op: f"{strength(op, 15):.3g}" for op in OPS}
    return {
        "level, of what it was designed for": "1.5",
        "operations to choose from": str(len(OPS)),
        "Rotate": f"±{at_15['Rotate']}°",
        "ShearX, ShearY": f"±{at_15['ShearX']}",
        "TranslateX, TranslateY": f"±{at_15['TranslateX']} px",
        "Color, Brightness, Contrast, Sharpness": at_15["Color"],
        "Posterize, bits kept": at_15["Posterize"],
        "Solarize, from": at_15["Solarize"],
        "SolarizeAdd": at_15["SolarizeAdd"],
        "Invert": yes("Invert" in OPS),
        "Cutout": f"{at_15['Cutout']} px",
        "Identity": yes("Identity" in OPS),
        "outside of the image": str(FILL),
    }


def timms() -> dict[str, str]:
    """timm's, from the operations that its configuration string makes."""
    ops = {op.name: op for op in rand_augment_transform("rand-m15-n2").ops}
    (clipped,) = {min(op.magnitude, op.magnitude_max or 10) for op in ops.values()}
    at = {name: abs(op.level_fn(clipped, op.hparams)[0]) for name, op in ops.items() if op.level_fn is not None}
    (probability,) = {op.prob for op in ops.values()}
    (fill,) = {value for op in ops.values() for value in op.kwargs["fillcolor"]}
    return {
        "level, of what it was designed for": f"{clipped / 10:g}",
        "probability of each operation": f"{probability:g}",
        "operations to choose from": str(len(ops)),
        "Rotate": f"±{at['Rotate']:g}°",
        "ShearX, ShearY": f"±{at['ShearX']:g}",
        "TranslateX, TranslateY": f"±{at['TranslateXRel'] * SIZE:g} px",
        "Color, Brightness, Contrast, Sharpness": f"{at['Color']:g}",
        "Posterize, bits kept": str(at["Posterize"]),
        "Solarize, from": str(at["Solarize"]),
        "SolarizeAdd": str(at["SolarizeAdd"]),
        "Invert": yes("Invert" in ops),
        "Cutout": yes("Cutout" in ops),
        "Identity": yes("Identity" in ops),
        "outside of the image": str(fill),
        "nearest pixel": yes("NEAREST" in str(ops["Rotate"].kwargs["resample"])),
    }


def torchvisions() -> dict[str, str]:
    """torchvision's, from its table of magnitudes."""
    augment = RandAugment(2, 15)
    space = augment._augmentation_space(augment.num_magnitude_bins, (SIZE, SIZE))
    at = {name: float(magnitudes[15]) for name, (magnitudes, _) in space.items() if magnitudes.ndim}
    return {
        "level, of what it was designed for": f"{15 / (augment.num_magnitude_bins - 1):g}",
        "operations to choose from": str(len(space)),
        "Rotate": f"±{at['Rotate']:g}°",
        "ShearX, ShearY": f"±{at['ShearX']:g}",
        "TranslateX, TranslateY": f"±{int(at['TranslateX'])} px",
        "Color, Brightness, Contrast, Sharpness": f"1 ± {at['Color']:g}",
        "Posterize, bits kept": f"{at['Posterize']:g}",
        "Solarize, from": f"{at['Solarize']:g}",
        "SolarizeAdd": yes("SolarizeAdd" in space),
        "Invert": yes("Invert" in space),
        "Cutout": yes("Cutout" in space),
        "Identity": yes("Identity" in space),
        "outside of the image": "0" if augment.fill is None else str(augment.fill),
        "nearest pixel": yes(augment.interpolation == InterpolationMode.NEAREST),
    }


def dalis() -> dict[str, str]:
    """DALI's own, from its suite of operations."""
    suite_of = pytest.importorskip("nvidia.dali.auto_aug.rand_augment", reason="DALI is not installed")
    suite = {op.name: op for op in suite_of.get_rand_augment_suite()}
    at: dict[str, Any] = {
        name: op._map_mag_to_param(float(op._get_magnitudes(31)[15]))
        for name, op in suite.items()
        if op.mag_range is not None
    }
    return {
        "operations to choose from": str(len(suite)),
        "Rotate": f"±{at['rotate']:g}°",
        "ShearX, ShearY": f"±{at['shear_x'].max():g}",
        "TranslateX, TranslateY": f"±{at['translate_x'].max():g} px",
        "Color, Brightness, Contrast, Sharpness": f"1 ± {at['color'] - 1:.3g}",
        "Posterize, bits kept": str(bin(int(at["posterize"])).count("1")),
        "Solarize, from": f"{at['solarize']:g}",
        "SolarizeAdd": yes("solarize_add" in suite),
        "Invert": yes("invert" in suite),
        "Cutout": yes("cutout" in suite),
        "Identity": yes("identity" in suite),
    }


@pytest.mark.parametrize(
    ("library", "derive"), [("AugReg", ours), ("timm", timms), ("torchvision", torchvisions), ("DALI", dalis)]
)
def test_what_15_means_elsewhere_is_what_the_installed_libraries_do(library: str, derive: Any) -> None:
    rows = table("at magnitude 15")
    (column,) = {name for row in rows.values() for name in row if name.startswith(library)}
    derived = derive()
    assert {row: rows[row][column] for row in derived} == derived
