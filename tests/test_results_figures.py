"""``prelora figures``: what is drawn from collected results, what is left out, and what a figure says."""

import re
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from synthetic_results import EPOCHS, VARIANTS, top1, write_results

from prelora.analysis.results.command import FIGURES, write_figures
from prelora.analysis.results.cost_figures import accuracy_wall_clock, speedup_ceiling
from prelora.analysis.results.differences import alternatives, controls, top1_difference
from prelora.analysis.results.figures import fig4, fig5, fig6, ranks
from prelora.analysis.results.loading import MissingDataError, load_results
from prelora.analysis.results.phase_figure import fig7
from prelora.analysis.results.table import table1
from prelora.cli import main

LABELS = {
    "fig1": ("epoch", "Frobenius norm, mean over layers", "mean cross-entropy", "mlp_out"),
    "fig3": ("epoch", "Frobenius norm of the query weight", "layer (first dashed, last thick)"),
    "fig4": ("epoch", "epoch time of full over this one (×)", "top-1 accuracy (%)", "Exp3"),
    "fig5": ("epoch", "epoch time of full over this one (×)", "mean cross-entropy", "w = 15"),
    "fig6": ("epochs since the switch", "Frobenius norm, mean over layers", "w = 2"),
    "fig7": ("time of an epoch (s)", "training throughput (img/s)", "memory by item (MiB)", "peak memory (MiB)"),
    "ranks": ("layer", "group", "seed 2"),
    "accuracy_wall_clock": (
        "training time on the quiet machine (min)",
        "validation top-1 (%)",
        "time saved (% of full training)",
        "top-1 less full's (percentage points)",
    ),
    "flops_loss": ("training so far (TFLOP)", "mean cross-entropy"),
    "speedup_ceiling": ("speed-up over full training (×)", "reversed ranks"),
    "controls": ("top-1 less that of full training, same seed (percentage points)", "frozen, no LoRA"),
    "alternatives": ("top-1 less that of Exp2, same seed (percentage points)", "switch by group"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results") / "digits")


@pytest.fixture(scope="module")
def results(folder):
    return load_results(folder)


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "clipart"
    return load_results(write_results(folder, ("full", "exp2"), seeds=(0,), environment=False))


@pytest.fixture(scope="module")
def written(folder):
    return write_figures(folder.parent, folder.parent / "drawn")


def words_below(figure):
    return figure.get_supxlabel()


def bands(figure):
    return [band for axes in figure.axes for band in axes.collections if isinstance(band, PolyCollection)]


def row_labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_every_figure_is_written_as_png_and_svg(folder, written):
    out = folder.parent / "drawn" / "digits"

    names = [draw.__name__ for draw in FIGURES]
    assert names == list(LABELS)
    assert written == [*(str(out / f"{name}.{kind}") for name in names for kind in ("png", "svg")), f"{out}/table1.md"]
    assert all(Path(path).stat().st_size > 500 for path in written)


@pytest.mark.parametrize("name", LABELS)
def test_axes_say_what_and_in_which_unit(folder, written, name):
    svg = (folder.parent / "drawn" / "digits" / f"{name}.svg").read_text(encoding="utf-8")

    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert set(LABELS[name]) <= set(texts)


def test_figures_stand_beside_the_data_unless_told_otherwise(tmp_path, capsys):
    write_results(tmp_path / "clipart", ("full",), seeds=(0,), timed=())

    assert main(["figures", str(tmp_path)]) == 0

    printed = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "clipart" / "figures" / "fig1.png") in printed
    assert "clipart: fig4 left out: no run of exp1 or exp2 or exp3" in printed
    assert (tmp_path / "clipart" / "figures" / "table1.md").exists()


def test_a_folder_without_a_data_set_is_bad_input(tmp_path, capsys):
    assert main(["figures", str(tmp_path)]) == 2

    assert "no data set: accepted is a folder that holds NAME/runs.csv" in capsys.readouterr().err


@pytest.mark.parametrize("draw", FIGURES, ids=[draw.__name__ for draw in FIGURES])
@pytest.mark.parametrize("kept", ["runs.csv", "runs.csv epochs.csv", "runs.csv norms.csv timing.csv"])
def test_what_was_not_measured_is_said_and_never_an_error(tmp_path, draw, kept):
    folder = write_results(tmp_path / "clipart", ("full", "exp2", "w3", "per_group"), seeds=(0, 1))
    for file in folder.iterdir():
        if file.name not in kept.split():
            file.unlink()
    incomplete = load_results(folder)

    try:
        outcome = draw(incomplete)
    except MissingDataError as error:
        outcome = str(error)

    assert isinstance(outcome, Figure) or outcome.startswith("no ")


def test_one_seed_has_no_band_and_says_so(results, one_seed):
    assert bands(fig4(one_seed)) == []
    assert words_below(fig4(one_seed)).startswith("clipart, n = 1.")
    assert len(bands(fig4(results))) == 4 * 4
    assert "n = 3. Lines: means over seeds; bands: smallest to largest seed" in words_below(fig4(results))


def test_speed_up_without_timing_is_said_in_its_panel(tmp_path):
    untimed = load_results(write_results(tmp_path / "clipart", ("full", "exp2"), seeds=(0,), timed=()))

    panel = fig4(untimed).axes[1]

    assert [text.get_text() for text in panel.texts] == ["no step of phase full in timing.csv"]


def test_the_machine_is_named_where_time_is_shown(results, one_seed):
    assert words_below(fig7(results)).endswith("Some CPU 9000, 2 cores.")
    assert "CPU" not in words_below(fig7(one_seed))


def test_exp2_stands_in_for_a_warm_up_of_two_epochs(results):
    legend = fig5(results).legends[0]

    assert [text.get_text() for text in legend.get_texts()] == [
        "full training",
        *(f"w = {width}" for width in (1, 2, 3, 5, 10, 15)),
    ]


def test_a_warm_up_is_drawn_from_the_switch_to_the_freeze(results):
    base, lora = fig6(results).axes

    lines = {line.get_label(): list(line.get_xdata()) for line in base.get_lines()}
    assert {width: lines[f"w = {width}"] for width in (1, 3, 15)} == {w: list(range(w + 1)) for w in (1, 3, 15)}
    assert [line.get_ydata()[0] for line in lora.get_lines() if line.get_label() == "w = 5"] == [0]


def test_ranks_stand_in_their_cells(results):
    panels = [axes for axes in ranks(results).axes if axes.get_title(loc="left") == "seed 1"]

    cells = {text.get_position(): int(text.get_text()) for text in panels[0].texts}
    groups = list(dict.fromkeys(row.group for row in results.ranks))
    expected = {
        (row.layer + 0.5, groups.index(row.group) + 0.5): row.rank
        for row in results.ranks
        if (row.variant, row.seed) == ("exp2", 1)
    }
    assert cells == expected


def test_a_rank_has_the_same_shade_for_every_seed(tmp_path):
    folder = write_results(tmp_path / "digits", ("full", "exp2"))
    text = (folder / "ranks.csv").read_text()
    (folder / "ranks.csv").write_text(re.sub(r"(?m)^(exp2,2,.*),4,0\.4$", r"\1,32,3.2", text))  # seed 2 has no rank 4

    figure = ranks(load_results(folder))

    shades = {}
    for axes in figure.axes:
        values = axes.collections[0].get_array().ravel()
        for text, value in zip(axes.texts, values, strict=True):
            shades.setdefault(text.get_text(), set()).add(float(value))
    assert {rank: len(values) for rank, values in shades.items()} == dict.fromkeys(("4", "8", "16", "32"), 1)


def differences_of(variant, baseline):
    return [top1(variant, seed, EPOCHS) - top1(baseline, seed, EPOCHS) for seed in (0, 1, 2)]


@pytest.mark.parametrize(
    ("draw", "baseline", "variants"),
    [
        (controls, "full", list(VARIANTS)[1:]),
        (alternatives, "exp2", ["lora_lr4", "lora_init", "per_group", "update_rank"]),
    ],
    ids=["controls", "alternatives"],
)
def test_differences_are_paired_in_the_order_of_the_runs(results, draw, baseline, variants):
    (axes,) = draw(results).axes

    assert row_labels(axes) == [VARIANTS[variant][0] for variant in variants]
    diamonds = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "D"]
    assert diamonds == pytest.approx([top1_difference(results, variant, baseline).mean for variant in variants])
    shared = [variant for variant in variants if variant != "compressed"]  # it ends at another epoch
    expected = {variant: pytest.approx(differences_of(variant, baseline)) for variant in shared}
    assert {variant: list(top1_difference(results, variant, baseline).values) for variant in shared} == expected


def test_every_speed_up_stands_beside_its_ceiling(results):
    whole, lora = speedup_ceiling(results).axes

    texts = [text.get_text() for text in whole.texts]
    assert len(texts) == len(VARIANTS) - 1
    assert texts[1] == "1.08 of 1.13"
    assert [text.get_text() for text in lora.texts].count("no LORA phase") == 3


def test_the_main_plot_tells_each_variants_end(results):
    figure = accuracy_wall_clock(results)
    told = [text.get_text() for text in figure.legends[0].get_texts()]

    exp2 = top1_difference(results, "exp2", "full")
    assert [line.split(":")[0] for line in told] == ["full training", "Exp1", "Exp2", "Exp3", "full, shorter"]
    assert told[2].endswith(f"; {exp2.told()} points, 7.4 % of the time saved, FLOPs allow 11.8 %")


def test_the_main_plot_of_one_seed_has_no_whisker_and_says_so(one_seed):
    figure = accuracy_wall_clock(one_seed)

    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert all(" % (n = 1) in " in line for line in told)
    assert [container for axes in figure.axes for container in axes.containers if container.has_yerr] == []


def test_whiskers_at_the_end_are_the_interval(results):
    _, final = accuracy_wall_clock(results).axes

    exp1 = top1_difference(results, "exp1", "full")
    upright = [bar.get_segments()[0] for bar in final.containers[0].lines[2]][1]
    assert [y for _, y in upright] == pytest.approx([exp1.mean - exp1.half_width, exp1.mean + exp1.half_width])


def cells(table, title):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_holds_every_variant_with_its_spread(results):
    table = table1(results)

    difference = top1_difference(results, "exp2", "full")
    low, high = (difference.mean + side * difference.half_width for side in (-1, 1))
    interval = f"{difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    row = cells(table, "Exp2")
    assert row[1:4] == ["2", "10", "15, 15, 15"]
    assert row[5:7] == [interval, "7.4 ± 0.0 (11.8)"]
    assert row[8:] == ["11.8 ± 0.0", "7.0", "3"]
    assert cells(table, "full training")[5] == "–"
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 1 + len(VARIANTS)


def test_table_says_whose_steps_were_borrowed(results):
    assert "timed as those of exp2: w = 1, w = 3, w = 5, w = 10, w = 15, uniform ranks, " in table1(results)


def test_table_of_one_seed_has_no_interval(one_seed):
    row = cells(table1(one_seed), "Exp2")

    assert re.fullmatch(r"−\d\.\d\d \(one seed\)", row[5])
    assert row[-1] == "1"
