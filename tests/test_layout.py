"""Who may import whom, held by walking the import statements of the whole tree, also those inside functions."""

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A module imports from its own row and from the rows below it, never from one above. "__init__" is `import prelora`.
LAYERS = (
    ("cli", "train", "integrations", "analysis", "info"),
    ("__init__",),
    ("controller",),
    ("state", "events", "sharded_checkpoint"),
    ("window_update", "units", "ramp"),
    ("surgery", "optim", "distributed", "monitor", "sharding", "sharded_norms", "targets", "checkpoint"),
    ("nn",),
    ("ops",),
    ("kernels", "registry", "_ext"),
    ("tensor_trees",),
    ("shards", "sketch"),
    ("convergence", "ranks", "data"),
    ("config", "errors", "exits", "files", "precision"),
)

# These import nothing else: the algorithm is arithmetic on numbers, without torch.
PURE = {
    "prelora/config.py": set(),
    "prelora/errors.py": set(),
    "prelora/convergence.py": {"prelora.config", "prelora.errors"},
    "prelora/ranks.py": {"prelora.config", "prelora.errors"},
}

CORE = {"torch", "numpy", "safetensors", "prelora"}
"""Top-level packages that all of prelora may import, beside the standard library."""
WITH_EXTRAS = ("prelora/train/", "prelora/data/", "prelora/analysis/", "prelora/integrations/")
"""Only these import optional extras: timm, transformers, scikit-learn, tyro, matplotlib and their like."""
LAZY = (
    "prelora.kernels",
    "nvidia.dali",
    "timm",
    "transformers",
    "accelerate",
    "peft",
    "lightning",
    "sklearn",
    "matplotlib",
    "tyro",
    "torchvision",
    "triton",
    "lightning",
    "accelerate",
    "scipy",
    "tensorboard",
    "wandb",
    "mlflow",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.testing",
)
"""What ``import prelora`` leaves alone, unless ``import torch`` has loaded it."""

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "prelora").rglob("*.py"))
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.py"))
TREE = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ROOT.iterdir()
    if not top.name.startswith(".") and top.name not in ("build", "dist", "runs")
    for path in (top.rglob("*.py") if top.is_dir() else [top] * (top.suffix == ".py"))
)


def module_name(file: str) -> str:
    """``kernels/x.py`` is prelora.kernels.x, as installed."""
    parts = Path(file).with_suffix("").parts
    parts = ("prelora", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(file) for file in [*PACKAGE, *KERNELS]}


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Absolute names of what ``source``, a module in ``package``, imports anywhere; of ours, the modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                member = f"{origin}.{alias.name}"
                yield origin if is_within(origin, "prelora") and member not in OURS else member
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


@functools.cache
def imports_of(file: str) -> set[str]:
    name = module_name(file)
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
    return set(imported_modules((ROOT / file).read_text(encoding="utf-8"), package))


def top(module: str) -> str:
    return module.split(".")[0]


def is_within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def layer(module: str) -> int:
    """The row of LAYERS from below: a module may import what is not higher."""
    name = module.split(".")[1] if "." in module else "__init__"
    rows = [row for row, names in enumerate(reversed(LAYERS)) if name in names]
    assert rows, f"{module} has no place in LAYERS: give it one"
    return rows[0]


def run_from_root(code: str) -> str:
    """What ``code`` prints in a fresh interpreter that has the repository's root first on sys.path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("import timm.layers as layers", "timm.layers"),
        ("from nvidia import dali", "nvidia.dali"),
        ("from prelora import ranks", "prelora.ranks"),
        ("from prelora import PreLoRAConfig", "prelora"),
        ("from prelora.ranks import bucket", "prelora.ranks"),
        ("from .linear import LoRALinear", "prelora.nn.linear"),
        ("from .. import ranks", "prelora.ranks"),
        ("from ..ranks import bucket", "prelora.ranks"),
        ("def load():\n    import triton", "triton"),
        ("if TYPE_CHECKING:\n    import triton", "triton"),
        ("importlib.import_module('triton')", "triton"),
    ],
)
def test_every_kind_of_import_is_seen(statement, module):
    assert list(imported_modules(statement, "prelora.nn")) == [module]


@pytest.mark.parametrize(("file", "allowed"), PURE.items())
def test_algorithm_is_free_of_torch(file, allowed):
    assert {module for module in imports_of(file) if top(module) not in sys.stdlib_module_names} <= allowed


@pytest.mark.parametrize("file", [*PACKAGE, *KERNELS])
def test_dependencies_point_one_way(file):
    ours = {module for module in imports_of(file) if top(module) == "prelora"}

    assert [module for module in sorted(ours) if layer(module) > layer(module_name(file))] == []


@pytest.mark.parametrize("file", KERNELS)
def test_kernels_import_only_torch_and_triton(file):
    foreign = {module for module in imports_of(file) if not is_within(module, "prelora.kernels")}

    assert {top(module) for module in foreign} <= {"torch", "triton", *sys.stdlib_module_names}


def test_kernels_are_never_imported_under_another_librarys_name():
    assert [file for file in TREE if "kernels" in map(top, imports_of(file))] == []


def test_dali_is_imported_by_the_two_files_of_its_pipeline_only():
    importers = {file for file in TREE if any(is_within(module, "nvidia.dali") for module in imports_of(file))}

    assert {file for file in importers if file.startswith("prelora/")} <= {
        "prelora/data/dali.py",
        "prelora/data/dali_randaugment.py",
    }


@pytest.mark.parametrize("file", [file for file in PACKAGE if not file.startswith(WITH_EXTRAS)])
def test_core_imports_no_optional_extra(file):
    assert {top(module) for module in imports_of(file)} <= CORE | sys.stdlib_module_names


@pytest.fixture(scope="module")
def loaded_beyond_torch():
    code = "import json, sys, torch; own = set(sys.modules); import prelora; print(json.dumps([*{*sys.modules} - own]))"
    return set(json.loads(run_from_root(code)))


@pytest.mark.parametrize("module", LAZY)
def test_import_prelora_does_not_load(module, loaded_beyond_torch):
    assert "prelora" in loaded_beyond_torch
    assert module not in loaded_beyond_torch


def test_import_prelora_loads_nothing_foreign_beyond_torchs_own_import(loaded_beyond_torch):
    assert set(map(top, loaded_beyond_torch)) <= CORE | sys.stdlib_module_names


HUGGING_FACE = """
import importlib.util, sys
assert sys.path[0] == "", sys.path
print(importlib.util.find_spec("kernels").origin)
import peft
from transformers import ViTModel
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "peft"))), reason="transformers and peft are not installed"
)
def test_our_kernels_folder_does_not_disturb_hugging_face():
    shadowing, taken_for_the_library = run_from_root(HUGGING_FACE).splitlines()

    assert Path(shadowing) == ROOT / "kernels" / "__init__.py"
    assert taken_for_the_library == "False"
