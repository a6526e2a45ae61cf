"""Reading collected results: what is joined, what is refused, and how long a run takes on a quiet machine."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_results import (
    BATCH,
    EPOCHS,
    FULL_FLOPS,
    IMAGES,
    PHASE_FLOPS,
    PHASE_SECONDS,
    SHORTER,
    phase_of,
    write_results,
)

from prelora.analysis.results.clock import (
    baseline_of,
    epoch_seconds,
    phase_ceiling,
    phase_time,
    run_speed_up,
    wall_clock,
)
from prelora.analysis.results.loading import MissingDataError, join_prefixes, load_results
from prelora.analysis.results.rows import NormRow, RunRow, TimingRow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    variants = ("full", "exp2", "exp1", "w1", "w15", "compressed")
    return load_results(write_results(tmp_path_factory.mktemp("results") / "digits", variants, timed=("exp1", "exp2")))


def run_of(variant, seed, epochs, prefix=0):
    numbers = dict.fromkeys(("final_top1", "best_top1", "final_loss", "eval_loss", "step_seconds"), math.nan)
    sizes = {"parameters": math.nan, "trainable": math.nan}
    switch = {"switch_epoch": None, "freeze_epoch": None, "prefix_epochs": prefix}
    return RunRow(variant=variant, seed=seed, title=variant, epochs=epochs, flops=1.0, **switch, **numbers, **sizes)


def norms_of(variant, seed, epochs):
    rows = [(epoch, group) for epoch in epochs for group in ("q", "k")]
    return [NormRow(variant, seed, epoch, group, 1.0, math.nan, math.nan, 0.1) for epoch, group in rows]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), st.randoms())
def test_a_forked_run_is_its_baselines_prefix_then_its_own_epochs(lengths, shuffling):
    epochs, prefix = lengths
    runs = [run_of("full", 7, epochs), run_of("full", 8, epochs), run_of("exp2", 7, epochs, prefix)]
    full = norms_of("full", 7, range(1, epochs + 1))
    own = norms_of("exp2", 7, range(prefix + 1, epochs + 1))
    rows = [*own, *full, *norms_of("full", 8, range(1, epochs + 1))]
    shuffling.shuffle(rows)

    joined = join_prefixes(runs, rows, Path("norms.csv"))

    found = joined["exp2", 7]
    assert [row.epoch for row in found] == sorted(row.epoch for row in found)
    assert set(found) == {*full[: 2 * prefix], *own}
    assert len(found) == 2 * epochs
    assert set(joined["full", 7]) == set(full)


@pytest.mark.parametrize(
    ("runs", "rows", "message"),
    [
        ([run_of("full", 0, 3)], norms_of("exp9", 0, [1]), "exp9, seed 0: accepted are the runs of runs.csv"),
        (
            [run_of("full", 0, 3), run_of("exp1", 0, 3, 2)],
            [*norms_of("full", 0, [1, 2, 3]), *norms_of("exp1", 0, [2, 3])],
            "exp1, seed 0: a row for epoch 2: accepted are those after its prefix of 2",
        ),
        (
            [run_of("full", 1, 3), run_of("exp1", 0, 3, 2)],
            [*norms_of("full", 1, [1, 2, 3]), *norms_of("exp1", 0, [3])],
            "exp1, seed 0: shares 2 epochs with full of that seed, which has not all of them",
        ),
    ],
)
def test_rows_that_cannot_be_joined_are_refused(runs, rows, message):
    with pytest.raises(ValueError, match=rf"norms\.csv: {message}"):
        join_prefixes(runs, rows, Path("norms.csv"))


def test_every_run_has_all_its_epochs(results):
    lengths = {run.variant: [row.epoch for row in results.epochs_of(run)] for run in results.runs}

    expected = {variant: list(range(1, EPOCHS + 1)) for variant in results.variants}
    assert lengths == expected | {"compressed": list(range(1, SHORTER + 1))}


def test_variants_stay_in_the_order_of_the_file(results):
    assert results.variants == ["full", "exp2", "exp1", "w1", "w15", "compressed"]


def test_an_empty_cell_is_not_measured(results):
    full = results.of("full")[0]

    assert full.switch_epoch is None
    assert math.isnan(full.tau)
    assert math.isnan(results.epochs_of(full)[0].top1)


def edit(path, change):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def replace_cell(line, column, text):
    """The change of a CSV text that puts ``text`` into a cell; lines count from 1, the header."""

    def change(content):
        lines = content.splitlines()
        cells = lines[line - 1].split(",")
        cells[lines[0].split(",").index(column)] = text
        return "\n".join([*lines[: line - 1], ",".join(cells), *lines[line:]]) + "\n"

    return change


def drop_line(number):
    return lambda content: "".join(line for i, line in enumerate(content.splitlines(True), 1) if i != number)


REFUSED = {
    "an integer that is none": ("runs.csv", replace_cell(2, "seed", "zero"), "line 2, column seed: 'zero': accepted"),
    "a number that is none": ("epochs.csv", replace_cell(4, "train_loss", "1,5"), "line 4: 20 cells: accepted are 19"),
    "a text in a number": (
        "norms.csv",
        replace_cell(3, "norm", "big"),
        "line 3, column norm: 'big': accepted is a num",
    ),
    "no title": ("runs.csv", replace_cell(3, "title", ""), "line 3, column title: the cell is empty: accepted is a te"),
    "a column that is missing": ("runs.csv", replace_cell(1, "flops", "work"), "line 1: no column 'flops': there are"),
    "a phase unknown": ("epochs.csv", replace_cell(5, "phase", "cooldown"), "line 5, column phase: 'cooldown': accept"),
    "no time at all": ("timing.csv", replace_cell(2, "seconds", "0"), r"line 2, column seconds: 0\.0: accepted is ab"),
    "a time left out": ("timing.csv", replace_cell(2, "seconds", ""), "line 2, column seconds: the cell is empty"),
    "FLOPs below zero": ("runs.csv", replace_cell(2, "flops", "-1"), r"line 2, column flops: -1\.0: accepted is above"),
    "a prefix too long": ("runs.csv", replace_cell(3, "prefix_epochs", "99"), "line 3, column prefix_epochs: 99: acc"),
    "an epoch twice": ("epochs.csv", replace_cell(3, "epoch", "1"), "line 3: variant full, seed 0, epoch 1 stands in"),
    "an epoch missing": ("epochs.csv", drop_line(21), "full, seed 0: epoch 20: accepted are all from 1 to 30, once"),
    "no run": ("runs.csv", lambda content: content.splitlines()[0] + "\n", "line 2: no run: accepted is at least one"),
    "an empty file": ("runs.csv", lambda content: "", "line 2: no run: accepted is at least one"),
    "no header": ("epochs.csv", lambda content: "\n" + content, "line 1: no column 'variant': there are none"),
    "JSON cut short": ("environment.json", lambda content: content[:20], "line 1, column "),
    "JSON of another kind": ("environment.json", lambda content: "[1]", "a list: accepted is an object"),
}


@pytest.mark.parametrize(("file", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_malformed_file_is_refused_with_file_line_and_column(tmp_path, file, change, message):
    folder = write_results(tmp_path / "digits", ("full", "exp2"), seeds=(0,))
    edit(folder / file, change)

    with pytest.raises(ValueError, match=rf"digits/{file}: {message}"):
        load_results(folder)


def test_columns_without_a_meaning_change_nothing(tmp_path):
    folder = write_results(tmp_path / "digits", ("full", "exp2"), seeds=(0,))
    before = load_results(folder)
    edit(folder / "ranks.csv", lambda content: "".join(f"{line},more\n" for line in content.splitlines()))

    assert load_results(folder).ranks == before.ranks


@pytest.mark.parametrize("text", ["", "\n"])
def test_a_table_without_rows_may_lack_its_header(tmp_path, text):
    folder = write_results(tmp_path / "digits", ("full", "exp2"), seeds=(0,))
    (folder / "ranks.csv").write_text(text)

    assert load_results(folder).ranks == ()


def test_only_the_runs_must_be_there(tmp_path):
    folder = write_results(tmp_path / "digits", ("full", "exp2"), seeds=(0,))
    for file in folder.iterdir():
        if file.name != "runs.csv":
            file.unlink()

    found = load_results(folder)

    assert (found.epochs, found.norms, found.layers, found.ranks, found.timing, found.environment) == (
        {},
        {},
        (),
        (),
        (),
        {},
    )


def test_speed_up_of_a_phase_is_exact_though_whole_rounds_were_slow(results):
    times = {phase: phase_time(results, results.of("exp1")[0], phase) for phase in PHASE_SECONDS}

    ratios = {phase: PHASE_SECONDS["full"] / seconds for phase, seconds in PHASE_SECONDS.items()}
    assert {phase: time.ratio for phase, time in times.items()} == pytest.approx(ratios)


def test_wall_clock_is_steps_times_the_quiet_step_of_the_epochs_phase(results):
    run = results.of("exp2")[1]
    step = {phase: BATCH * phase_time(results, run, phase).seconds for phase in PHASE_SECONDS}

    seconds = epoch_seconds(results, run)

    assert seconds == pytest.approx({e: IMAGES / BATCH * step[phase_of("exp2", e)] for e in range(1, EPOCHS + 1)})
    assert wall_clock(results, run) == pytest.approx(sum(seconds.values()))


@pytest.mark.parametrize("variant", ["exp1", "exp2", "w1", "w15"])
def test_speed_up_of_a_run_beside_its_ceiling(results, variant):
    phases = [phase_of(variant, epoch) for epoch in range(1, EPOCHS + 1)]

    measured, ceiling = run_speed_up(results, results.of(variant)[2])

    assert measured == pytest.approx(EPOCHS * PHASE_SECONDS["full"] / sum(PHASE_SECONDS[phase] for phase in phases))
    assert ceiling == pytest.approx(EPOCHS / sum(PHASE_FLOPS[phase] for phase in phases))


def test_ceiling_of_a_phase_is_the_ratio_of_flops(results):
    assert phase_ceiling(results, results.of("exp1")[0], "lora") == pytest.approx(1 / PHASE_FLOPS["lora"])


def timing(variant, seed, lora):
    return [TimingRow(variant, seed, phase, 0, seconds, 10) for phase, seconds in (("full", 4.0), ("lora", lora))]


@pytest.mark.parametrize(
    ("rows", "ratio", "source"),
    [
        ([*timing("w1", 1, 1.0), *timing("w1", 0, 2.0), *timing("exp2", 0, 3.0)], 4.0, "w1"),
        ([*timing("w1", 0, 2.0), *timing("exp2", 1, 3.0)], 2.0, "w1"),
        ([*timing("exp1", 1, 1.0), *timing("exp2", 0, 3.0)], 4 / 3, "exp2"),
        ([*timing("exp2", 0, 3.0)[:1], *timing("w1", 1, 5.0)[1:]], 0.8, "w1"),
    ],
    ids=["its own", "its variant's with another seed", "exp2's", "rounds without a full step"],
)
def test_which_steps_serve_a_run(results, rows, ratio, source):
    timed = dataclasses.replace(results, timing=tuple(rows))

    found = phase_time(timed, results.of("w1")[1], "lora")

    assert (found.ratio, found.seconds, found.source) == (pytest.approx(ratio), pytest.approx(0.4 / ratio), source)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no step of phase full in timing.csv"),
        (timing("exp1", 0, 1.0), "no step of phase lora in timing.csv, of w1 or of exp2"),
    ],
)
def test_an_untimed_phase_is_said(results, rows, message):
    with pytest.raises(MissingDataError, match=message):
        phase_time(dataclasses.replace(results, timing=tuple(rows)), results.of("w1")[1], "lora")


def test_a_run_is_held_against_full_training_of_its_own_seed(results):
    assert [baseline_of(results, run).seed for run in results.of("exp2")] == [0, 1, 2]
    assert results.of("full")[0].flops == pytest.approx(EPOCHS * FULL_FLOPS)

    with pytest.raises(MissingDataError, match="no run of full, seed 5"):
        baseline_of(results, dataclasses.replace(results.of("exp2")[0], seed=5))
