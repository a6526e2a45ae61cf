"""The declared experiments: every run has a config, is trained once, and ends up in the tables that figures read."""

import csv
import dataclasses

import pytest
import yaml
from launching import assert_equal, outcome
from tiny_runs import TINY, train

from experiments import collect, declaration, run, step_times
from prelora.analysis.records import load_run
from prelora.analysis.results.clock import wall_clock
from prelora.analysis.results.loading import load_results
from prelora.train.config import load_yaml, to_dict

DATASETS = declaration.load_grid()
DECLARED = [(dataset, variant) for dataset in DATASETS for variant in dataset.variants]

OVERRIDES = to_dict(dataclasses.replace(TINY, epochs=8))
del OVERRIDES["output"], OVERRIDES["seed"], OVERRIDES["prelora"]["tau"]
SMALL = {
    "seeds": [0, 1],
    "threads": 1,
    "datasets": {"digits": {"config": OVERRIDES, "variants": ["full", "exp2", "w1", "compressed", "stop_decay"]}},
    "variants": {
        "full": {"title": "full rank", "config": {"method": "full", "prelora": {"tau": 1e-9}}},
        "exp2": {"title": "Exp2", "fork": True, "config": {"prelora": {"tau": 1e4}}},
        "w1": {"title": "w = 1", "fork": True, "like": "exp2", "config": {"prelora": {"warmup_epochs": 1}}},
        "compressed": {"title": "as long", "equal_wall_clock": "exp2", "config": {"method": "full"}},
        "stop_decay": {
            "title": "stopped",
            "stop_at_switch_of": "exp2",
            "cooldown_epochs": 2,
            "config": {"method": "full"},
        },
    },
}


@pytest.mark.parametrize(("dataset", "variant"), DECLARED, ids=[f"{d.name}-{v.name}" for d, v in DECLARED])
def test_every_declared_run_has_a_valid_config(dataset, variant):
    config = dataset.config(variant, dataset.seeds[-1])

    assert config.seed == dataset.seeds[-1]
    assert config.output == declaration.RUNS / dataset.name / variant.name / f"seed{dataset.seeds[-1]}"
    assert (config.method == "full") == (variant.overrides.get("method") == "full")


@pytest.mark.parametrize("dataset", DATASETS, ids=[dataset.name for dataset in DATASETS])
def test_the_full_rank_run_comes_first_and_seeds_are_three(dataset):
    assert dataset.variants[0].name == "full"
    assert len(set(dataset.seeds)) == 3


def test_a_variant_like_another_has_its_thresholds():
    fashion = DATASETS[0]

    exp2, other = (fashion.config(fashion.variant(name), 0).prelora for name in ("exp2", "w10"))

    assert dataclasses.replace(other, warmup_epochs=2) == exp2


def test_an_undeclared_variant_is_refused(tmp_path):
    grid = SMALL | {"datasets": {"digits": {"config": OVERRIDES, "variants": ["full", "exp9"]}}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))

    with pytest.raises(ValueError, match="variant 'exp9' is not declared; known are full, exp2"):
        declaration.load_grid(tmp_path / "grid.yaml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The small grid's data set, all of its runs trained, in this process, and its tables."""
    root = tmp_path_factory.mktemp("grid")
    (root / "grid.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(declaration, "RUNS", root / "runs")
        for module in (collect, run):
            patch.setattr(module, "RESULTS", root / "results")
        patch.setattr(step_times, "ROUNDS", 2)
        patch.setattr(run, "launch", lambda config_file, threads: train(load_yaml(config_file)))
        patch.setattr(run, "measure", step_times.measure_here)
        (dataset,) = declaration.load_grid(root / "grid.yaml")
        for variant in dataset.variants:
            for seed in dataset.seeds:
                assert run.train(dataset, variant, seed) == 0
        yield dataset, load_results(root / "results" / "digits")


def test_every_run_is_in_the_tables(trained):
    dataset, results = trained

    assert [(row.variant, row.seed) for row in results.runs] == [
        (variant.name, seed) for variant in dataset.variants for seed in dataset.seeds
    ]


def test_a_run_that_shares_the_full_rank_runs_beginning_has_switched_by_itself(trained):
    _, results = trained

    (row,) = [row for row in results.of("exp2") if row.seed == 1]

    assert (row.prefix_epochs, row.switch_epoch, row.freeze_epoch) == (1, 2, 4)
    assert [epoch.epoch for epoch in results.epochs_of(row)] == list(range(1, 9))


def test_the_switch_is_the_one_that_replay_predicts_from_the_full_rank_log(trained):
    with (collect.RESULTS / "digits" / "runs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] in ("exp2", "w1")]

    assert len(rows) == 4
    assert [row["predicted_switch_epoch"] for row in rows] == [row["switch_epoch"] for row in rows] == ["2"] * 4


def test_the_shared_beginning_is_not_in_the_tables_twice(trained):
    dataset, results = trained
    variant = dataset.variant("w1")

    own = load_run(dataset.folder(variant, 0)).epochs

    joined = results.epochs_of(results.of("w1")[0])
    assert [epoch.train_loss for epoch in joined] == pytest.approx([epoch.loss for epoch in own], rel=1e-5)


def test_the_compressed_run_takes_as_long_as_its_model_to_the_nearest_epoch(trained):
    _, results = trained

    for compressed, exp2, full in zip(*map(results.of, ("compressed", "exp2", "full")), strict=True):
        epoch = wall_clock(results, full) / full.epochs
        assert compressed.epochs == round(wall_clock(results, exp2) / epoch)


def test_the_stopped_run_ends_after_the_switch_and_its_cooldown(trained):
    _, results = trained

    assert {row.epochs for row in results.of("stop_decay")} == {4}


def test_a_finished_run_is_not_trained_again(trained):
    dataset, _ = trained
    folder = dataset.folder(dataset.variant("exp2"), 0)
    before = outcome(folder)

    assert run.train(dataset, dataset.variant("exp2"), 0) == 0

    assert_equal(outcome(folder), before)


def test_tables_keep_the_runs_whose_folders_are_elsewhere_and_they_are_not_due(trained, tmp_path):
    dataset, _ = trained
    tables = {path.name: path.read_text() for path in (collect.RESULTS / "digits").glob("*.csv")}
    folder = dataset.folder(dataset.variant("w1"), 1)
    folder.rename(tmp_path / "elsewhere")

    try:
        collect.collect(dataset)
        assert run.train(dataset, dataset.variant("w1"), 1) == 0
        assert not folder.exists()
    finally:
        (tmp_path / "elsewhere").rename(folder)

    assert {path.name: path.read_text() for path in (collect.RESULTS / "digits").glob("*.csv")} == tables


def test_the_full_rank_run_is_due_again_where_a_run_to_fork_from_it_is_missing(trained, tmp_path):
    dataset, _ = trained
    full = dataset.folder(dataset.variant("full"), 0)
    table = collect.RESULTS / "digits" / "runs.csv"
    whole = table.read_text()
    full.rename(tmp_path / "full")

    try:
        not_missing = run.is_due(dataset, dataset.variant("full"), 0)
        table.write_text("".join(line for line in whole.splitlines(keepends=True) if not line.startswith("w1,0")))
        missing = run.is_due(dataset, dataset.variant("full"), 0)
    finally:
        table.write_text(whole)
        (tmp_path / "full").rename(full)

    assert (not_missing, missing) == (False, True)
