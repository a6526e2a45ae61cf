"""What an epoch of the trainer is: which part of a pass over the images, and whether it is evaluated."""

import pytest
from tiny_runs import metrics, tiny, train

from prelora.train.dry_run import describe


@pytest.mark.parametrize(("every", "evaluated"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (9, [6])])
def test_it_evaluates_every_so_many_epochs_and_after_the_last(tmp_path, every, evaluated):
    assert train(tiny(tmp_path / "run", eval_every=every, ema_decay=0.9)) == 0

    for field in ("eval", "ema_eval"):
        assert [line["epoch"] for line in metrics(tmp_path / "run") if line[field] is not None] == evaluated


def test_an_epoch_may_be_a_part_of_a_pass(tmp_path):
    assert train(tiny(tmp_path / "run", data={"epochs_per_pass": 4})) == 0

    assert [line["step"] for line in metrics(tmp_path / "run")] == [2, 4, 6, 8, 10, 12]


def test_more_epochs_per_pass_than_there_are_batches_are_refused(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", data={"epochs_per_pass": 9})) == 2

    assert "the global batch of 160 is larger than the 159 images of an epoch" in capsys.readouterr().err


def test_a_dry_run_counts_the_steps_that_an_epoch_has(tmp_path):
    config = tiny(tmp_path / "run", data={"epochs_per_pass": 4})

    assert "steps         2 an epoch × 6 epochs" in describe(config, 1)
