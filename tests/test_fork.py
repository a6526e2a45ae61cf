"""A run forked from another's checkpoint is, bit for bit, the run it would have been from the start, or is refused."""

import dataclasses
import json

import pytest
import yaml
from launching import assert_equal, outcome
from tiny_runs import tiny, train

from prelora.cli import main
from prelora.errors import CheckpointError
from prelora.train.config import CheckpointConfig
from prelora.train.fork import fork, forked_after

KEEP_ALL = CheckpointConfig(keep_last=1000)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six epochs at full rank, all of their checkpoints kept."""
    output = tmp_path_factory.mktemp("source") / "full"
    assert train(tiny(output, method="full", checkpoint=KEEP_ALL)) == 0
    return output


def forked(source, output, epoch, **changes):
    config = tiny(output, **changes)
    fork(source, epoch, config)
    return dataclasses.replace(config, resume="auto")


def trained_as(output):
    """What a run leaves, but for update ranks: the source had no reason to measure those of the epochs taken over."""
    left = outcome(output)
    left["monitor"] = {key: value for key, value in left["monitor"].items() if key != "updates"}
    for line in left["metrics"]:
        del line["event"]["update_ranks"]
    return left


OTHERS = {
    "as the recipe has it": {},
    "later": {"prelora": {"tau": 1e-9, "deadline": 4}},
    "without LoRA": {"prelora": {"assignment": "none", "warmup_epochs": 1}},
    "other ranks": {"prelora": {"assignment": "reversed"}},
    "LoRA from the last window": {"prelora": {"lora_init": "window_update", "m": 1, "tau": 1e-9, "deadline": 4}},
    "each group by itself": {"prelora": {"switch": "per_group"}},
    "never, stopped early": {"method": "full", "epochs": 4, "optim": {"schedule_epochs": 6, "cooldown_epochs": 2}},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_a_forked_run_equals_the_one_trained_from_the_start(source, tmp_path, changes):
    assert train(tiny(tmp_path / "whole", **changes)) == 0

    assert train(forked(source, tmp_path / "forked", 1, **changes)) == 0

    assert_equal(trained_as(tmp_path / "forked"), trained_as(tmp_path / "whole"))
    assert forked_after(tmp_path / "forked") == 1
    assert forked_after(tmp_path / "whole") == 0


def test_a_run_forked_within_a_window_has_the_weights_of_its_start(tmp_path):
    windows = {"m": 2, "k": 2}
    changes = {"prelora": {**windows, "lora_init": "window_update"}, "epochs": 8}
    assert train(tiny(tmp_path / "source", method="full", checkpoint=KEEP_ALL, epochs=8, prelora=windows)) == 0
    assert train(tiny(tmp_path / "whole", **changes)) == 0

    assert train(forked(tmp_path / "source", tmp_path / "forked", 3, **changes)) == 0

    assert_equal(trained_as(tmp_path / "forked"), trained_as(tmp_path / "whole"))


def test_a_criterion_of_which_the_source_kept_nothing_is_served_up_to_monitorings_start(tmp_path):
    late = {"monitor_from": 1}
    changes = {"prelora": {**late, "criterion": "update_rank", "update_rank_max": 1e6, "warmup_epochs": 1}}
    assert train(tiny(tmp_path / "source", method="full", checkpoint=KEEP_ALL, prelora=late)) == 0
    assert train(tiny(tmp_path / "whole", **changes)) == 0

    assert train(forked(tmp_path / "source", tmp_path / "forked", 1, **changes)) == 0

    assert_equal(trained_as(tmp_path / "forked"), trained_as(tmp_path / "whole"))


def test_a_criterion_of_which_the_source_kept_nothing_is_refused_after_monitorings_start(source, tmp_path):
    changes = {"prelora": {"criterion": "update_rank", "update_rank_max": 1e6}}

    with pytest.raises(ValueError, match="kept no changes of its windows; accepted are epochs up to monitor_from = 0"):
        fork(source, 1, tiny(tmp_path / "forked", **changes))


def test_the_source_is_left_as_it_was(source, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}

    assert train(forked(source, tmp_path / "forked", 1)) == 0

    assert {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()} == before


REFUSED = {
    "another seed": ({"seed": 1}, "seed = 1: the run to fork was trained with 0"),
    "another rate": ({"optim": {"lr": 0.5}}, r"optim.lr = 0.5: the run to fork was trained with 0.001"),
    "other windows": ({"prelora": {"k": 3}}, "prelora.k = 3: the run to fork was trained with 2"),
    "another schedule": ({"epochs": 9}, "schedule is over 9 epochs, that of the run to fork over 6"),
    "in the cooldown": (
        {"method": "full", "epochs": 2, "optim": {"schedule_epochs": 6, "cooldown_epochs": 1, "warmup_epochs": 1}},
        "epoch 2 lies in a cooldown, which starts after epoch 1",
    ),
    "switched before": ({}, "the switch comes after epoch 2: fork an earlier epoch than 2"),
}


@pytest.mark.parametrize(("changes", "complaint"), REFUSED.values(), ids=REFUSED)
def test_what_would_have_been_another_run_is_refused_and_leaves_nothing(source, tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        fork(source, 2, tiny(tmp_path / "forked", **changes))

    assert not (tmp_path / "forked").exists()


def test_an_epoch_without_a_checkpoint_is_refused_naming_those_with_one(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of the end of epoch 9, but of 1, 2, 3, 4, 5, 6"):
        fork(source, 9, tiny(tmp_path / "forked"))


def test_a_run_that_has_switched_cannot_become_another(tmp_path):
    assert train(tiny(tmp_path / "switched", checkpoint=KEEP_ALL)) == 0

    with pytest.raises(CheckpointError, match="is in phase 'lora': only a run in 'full' can become another"):
        fork(tmp_path / "switched", 5, tiny(tmp_path / "forked"))


def test_a_folder_that_is_there_is_left_alone(source, tmp_path):
    fork(source, 1, tiny(tmp_path / "forked"))

    with pytest.raises(ValueError, match="forked exists: give another"):
        fork(source, 1, tiny(tmp_path / "forked"))


def test_the_command_forks_and_says_how_to_go_on(source, tmp_path, capsys):
    output = tmp_path / "forked"
    options = ["--method", "prelora", "--prelora.warmup-epochs", "1", "--output", str(output)]

    assert main(["fork", str(source), "--epoch", "1", *options]) == 0

    assert f"Next: prelora train --config {output / 'config.yaml'}" in capsys.readouterr().out
    assert yaml.safe_load((output / "config.yaml").read_text())["prelora"]["warmup_epochs"] == 1
    assert json.loads((output / "fork.json").read_text()) == {"source": str(source), "epoch": 1}
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_command_does_not_fork_a_run_onto_itself(source, capsys):
    assert main(["fork", str(source), "--epoch", "1"]) == 2

    assert "is the run itself: give --output" in capsys.readouterr().err
