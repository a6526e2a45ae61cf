"""``prelora replay``: the log of one run tells, without training, what another setting would have done."""

import csv
import json
import math
import random

import pytest
from tiny_runs import TINY, finished, metrics

from prelora.analysis.drawing import save_figure
from prelora.analysis.records import load_run
from prelora.analysis.replay import replay
from prelora.analysis.replay_command import main as replay_command
from prelora.analysis.replay_figure import draw_grid
from prelora.analysis.replay_log import NormLog, load_log
from prelora.analysis.replay_thresholds import grid, reachable, suggest_saving, suggest_switch, switch_epoch
from prelora.cli import main
from prelora.config import PreLoRAConfig
from prelora.exits import EXIT_BAD_INPUT
from prelora.targets import Target

LIVE = (
    {"k": 2, "m": 1, "tau": 1e4, "zeta": 1e4},
    {"k": 2, "m": 2, "tau": 1e4, "zeta": 1e4, "monitor_from": 1, "normalize": "quantile", "window": "last"},
    {"k": 3, "m": 1, "tau": 1e-3, "zeta": 1e-3, "deadline": 4, "aggregate": "mean_abs", "budget": 0.12},
)
"""Settings of PreLoRAConfig that switch by the test, after a warm-up, and by force."""


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """The log of a run that never leaves FULL."""
    return finished(tmp_path_factory.mktemp("replay") / "baseline", method="full")


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """Runs that switched, by their settings' place."""
    folder = tmp_path_factory.mktemp("lived")
    return [finished(folder / str(place), prelora=settings) for place, settings in enumerate(LIVE)]


def options(settings):
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def replayed_json(*arguments):
    return json.loads(replay_command([*map(str, arguments), "--json"]))


def made_up(epochs=24, seed=0):
    """A log whose changes fade unevenly; two groups of three layers."""
    draw = random.Random(seed)
    targets = tuple(Target(f"{group}{layer}", group, layer) for group in ("q", "v") for layer in range(3))
    fading = [0.3 * 0.8**epoch for epoch in range(epochs)]
    norms = tuple({t.name: 1 + f * (2 + draw.random()) for t in targets} for f in fading)
    losses = tuple(2 + f * (8 + 4 * draw.random()) for f in fading)
    return NormLog("made up", targets, losses, norms, PreLoRAConfig(k=2, m=2), "the log ends")


@pytest.mark.parametrize("place", range(len(LIVE)))
def test_a_baselines_log_predicts_the_live_switch_and_the_very_ranks(baseline, lived, place):
    live = load_run(lived[place])

    predicted = replayed_json(baseline, *options(LIVE[place]))["runs"][0]

    assert predicted["switch_epoch"] == live.switch.epoch
    assert predicted["ranks"] == live.ranks
    assert predicted["reason"] == live.switch.event.reason


def test_predicted_costs_are_what_the_live_run_counted(baseline, lived):
    live = load_run(lived[0])

    costs = replayed_json(baseline, *options(LIVE[0]))["runs"][0]["costs"]

    assert costs["flops"] == pytest.approx(live.flops)
    assert costs["trainable"] == live.in_phase("lora")[-1].trainable
    assert costs["epochs"] == {"full": 2, "warmup": 2, "lora": 2}
    released = live.freeze.event.released
    assert costs["freed"] == pytest.approx(released["gradients"] + released["optimizer_state"], rel=0.01)


def test_a_run_replayed_at_its_own_settings_switches_where_it_did(lived):
    one = replayed_json(lived[0])["runs"][0]

    assert one["switch_epoch"] == one["recorded_switch_epoch"] == 2


def test_only_epochs_in_full_count_and_the_log_says_that_it_ends(lived):
    assert len(metrics(lived[0])) == TINY.epochs

    told = replay_command([str(lived[0]), "--tau", "0.001", "--zeta", "0.001"])

    assert "no switch; the run itself switched after epoch 2, and only epochs in FULL count" in told


def test_a_test_that_fails_names_groups_and_loss_with_the_points_that_are_missing(baseline):
    log = load_log(baseline)
    config = PreLoRAConfig(k=2, m=1, tau=1e-3, zeta=1e-3)

    first = replay(log, config).windows[0]

    held = first.held_back(config)
    assert list(held) == ["q", "k", "v", "attn_out", "mlp_in", "mlp_out", "loss"]
    assert held["loss"] == pytest.approx(100 * abs(log.losses[1] / log.losses[0] - 1) - 1e-3)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """A baseline's log with update ranks, of windows of two epochs."""
    settings = {"criterion": "update_rank", "m": 2}
    return finished(tmp_path_factory.mktemp("ranked") / "baseline", method="full", prelora=settings)


def test_a_baselines_update_ranks_predict_the_live_switch(ranked, tmp_path):
    windows = replay(load_log(ranked), PreLoRAConfig(criterion="update_rank", k=2, m=2)).windows
    assert [window.epoch for window in windows] == [4, 6]
    limit = max(windows[0].by_group.values())
    settings = {"criterion": "update_rank", "update_rank_max": limit, "k": 2, "m": 2, "zeta": 1e4}

    predicted, closer = (
        replayed_json(ranked, *options({**settings, "update_rank_max": most}))["runs"][0]
        for most in (limit, limit * 0.999)
    )

    live = load_run(finished(tmp_path / "live", prelora=settings))
    assert predicted["switch_epoch"] == live.switch.epoch == 4
    assert predicted["ranks"] == live.ranks
    assert predicted["reason"] == live.switch.event.reason
    assert closer["switch_epoch"] != 4
    assert list(closer["windows"][0]["held_back"].values()) == [pytest.approx(limit * 0.001)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"m": 1}, "m = 1: the update ranks of baseline are of its own windows, accepted is m = 2"),
        ({"monitor_from": 2}, "monitor_from = 2: the update ranks of baseline are of its own windows"),
        ({"suggest_switch": "2-6"}, "are about tau: accepted is --criterion norm"),
        ({"suggest_saving": 0}, "are about tau: accepted is --criterion norm"),
    ],
)
def test_what_a_logs_update_ranks_cannot_tell_is_refused(settings, said, ranked):
    with pytest.raises(ValueError, match=said):
        replay_command([str(ranked), *options(settings)])


def test_a_log_without_update_ranks_cannot_be_replayed_by_them(baseline, tmp_path):
    for log in (baseline, write_csv(tmp_path / "norms.csv", load_run(baseline))):
        with pytest.raises(
            ValueError, match=r"criterion = 'update_rank': the log of \w+ has no update ranks; accepted"
        ):
            replay_command([str(log), "--criterion", "update_rank"])


def test_a_log_with_update_ranks_is_replayed_by_norms_as_any_other(ranked, baseline):
    settings = ["--criterion", "norm", "--k", 2, "--m", 2, "--tau", 50, "--zeta", 50]

    by_norms, expected = (replayed_json(log, *settings)["runs"][0]["windows"] for log in (ranked, baseline))

    assert by_norms == expected


@pytest.mark.parametrize("min_epoch", [0, 9])
@pytest.mark.parametrize("deadline", [None, 13])
@pytest.mark.parametrize("seed", range(3))
def test_the_grid_is_what_replaying_each_pair_gives(seed, deadline, min_epoch):
    log, taus, zetas = made_up(seed=seed), [0.3, 1, 3, 10], [0.1, 1, 10, 40]
    config = PreLoRAConfig(k=2, m=2, monitor_from=1, deadline=deadline, min_epoch=min_epoch)

    found = grid(replay(log, config), taus, zetas)

    for tau, row in zip(taus, found, strict=True):
        for zeta, epoch in zip(zetas, row, strict=True):
            pair = PreLoRAConfig(k=2, m=2, monitor_from=1, deadline=deadline, min_epoch=min_epoch, tau=tau, zeta=zeta)
            assert epoch == replay(log, pair).switch_epoch
    assert len({epoch for row in found for epoch in row}) > 1


@pytest.mark.parametrize("seed", range(5))
def test_larger_thresholds_never_switch_later(seed):
    values = [0.01 * 1.6**step for step in range(18)]
    found = grid(replay(made_up(seed=seed), PreLoRAConfig(k=3, m=1)), values, values)
    late = [[math.inf if epoch is None else epoch for epoch in row] for row in found]

    for across in [*late, *zip(*late, strict=True)]:
        assert list(across) == sorted(across, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_suggested_thresholds_switch_where_they_say_and_smaller_ones_do_not(seed):
    log, config = made_up(seed=seed), PreLoRAConfig(k=2, m=1)
    suggested = suggest_switch(replay(log, config), 8, 16)

    for one in suggested:
        assert 8 <= one.switch_epoch <= 16
        again = replay(log, PreLoRAConfig(k=2, m=1, tau=one.tau, zeta=one.zeta))
        assert again.switch_epoch == one.switch_epoch
        for tau, zeta in ((0.998 * one.tau, one.zeta), (one.tau, 0.998 * one.zeta)):
            assert switch_epoch(again, tau, zeta) != one.switch_epoch


def test_a_window_in_which_no_thresholds_switch_is_refused_with_those_that_do():
    replayed = replay(made_up(epochs=8), PreLoRAConfig(k=2, m=2))

    with pytest.raises(ValueError, match=r"after 90 to 99 epochs; reachable are: .*8"):
        suggest_switch(replayed, 90, 99)


def test_a_wanted_saving_takes_the_latest_switch_that_reaches_it():
    replayed = replay(made_up(), PreLoRAConfig(k=2, m=1))
    epochs = [one.switch_epoch for one in reachable(replayed)]

    suggested = suggest_saving(replayed, 0.5, lambda epoch: 1 - epoch / 24)

    assert suggested.switch_epoch == max(epoch for epoch in epochs if epoch <= 12)
    with pytest.raises(ValueError, match=r"suggest-saving = 0.99: .* the most is"):
        suggest_saving(replayed, 0.99, lambda epoch: 1 - epoch / 24)


def test_the_commands_suggestions_are_confirmed_by_replaying_them(baseline):
    settings = ["--k", 2, "--m", 1, "--warmup-epochs", 1]
    suggested = replayed_json(baseline, *settings, "--suggest-switch", "2-6", "--suggest-saving", 0.02)["suggestions"]

    for one in suggested:
        again = replayed_json(baseline, *settings, "--tau", one["tau"], "--zeta", one["zeta"])["runs"][0]
        assert again["switch_epoch"] == one["switch_epoch"]
    assert again["costs"]["flops_saved"] == pytest.approx(suggested[-1]["saved"])
    assert suggested[-1]["saved"] >= 0.02


def test_a_loss_that_is_not_finite_holds_back_at_any_thresholds():
    log = made_up(epochs=6)
    broken = NormLog(log.name, log.targets, (*log.losses[:5], math.nan), log.norms, log.config, log.stopped_by)

    replayed = replay(broken, PreLoRAConfig(k=2, m=3, tau=1e9, zeta=1e9))

    assert replayed.switch_epoch is None
    assert reachable(replayed) == []
    assert replayed.windows[-1].held_back(replayed.config) == {"loss": math.inf}


# CSV.


def write_csv(path, run):
    groups = {target.name: target.group for target in run.info.targets}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "loss", *(f"{groups[name]}/{name}" for name in groups)])
        for epoch in run.in_phase("full"):
            writer.writerow([epoch.epoch, epoch.loss, *(epoch.norms[name] for name in groups)])
    return path


def test_a_csv_of_the_same_numbers_replays_as_the_run_does(baseline, tmp_path):
    settings = ["--k", 2, "--m", 2, "--tau", 50, "--zeta", 50, "--r-min", 1, "--r-max", 4]

    of_csv = replayed_json(write_csv(tmp_path / "norms.csv", load_run(baseline)), *settings)["runs"][0]

    of_run = replayed_json(baseline / "metrics.jsonl", *settings)["runs"][0]
    for field in ("switch_epoch", "windows", "ranks", "reason"):
        assert of_csv[field] == of_run[field]
    assert of_csv["costs"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch,q/a\n1,2\n", "accepted are epoch, loss, then group/name each"),
        ("epoch,loss,a\n1,2,3\n", "'a': accepted is group/name"),
        ("epoch,loss,q/a,v/a\n1,2,3,4\n", "another column of target 'a'"),
        ("epoch,loss,q/a\n1,2,3\n3,2,3\n", "epoch 3 where epoch 2 is due"),
        ("epoch,loss,q/a\n1,2\n", "2 values under 3 columns"),
        ("epoch,loss,q/a\n1,two,3\n", "'two' is not a number"),
        ("epoch,loss,q/a\n", "at least one epoch"),
    ],
)
def test_a_csv_that_cannot_be_read_says_what_is_accepted(text, said, tmp_path, capsys):
    (tmp_path / "norms.csv").write_text(text)

    assert main(["replay", str(tmp_path / "norms.csv")]) == EXIT_BAD_INPUT

    assert said in capsys.readouterr().err


# What is printed.


def test_several_runs_stand_in_one_table(baseline, lived, capsys):
    assert main(["replay", *map(str, [baseline, *lived])]) == 0

    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == ["run", "baseline", "0", "1", "2"]
    assert printed[0].split()[:2] == ["run", "k"]


def test_a_gap_in_the_log_is_refused(baseline, tmp_path, capsys):
    (tmp_path / "run.json").write_text((baseline / "run.json").read_text())
    lines = (baseline / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:1] + lines[2:]))

    assert main(["replay", str(tmp_path)]) == EXIT_BAD_INPUT

    assert "no record of epoch 2" in capsys.readouterr().err


def test_the_grid_is_drawn_with_every_epoch_written_and_saved_as_png_and_svg(tmp_path):
    figure = draw_grid("mine", [0.5, 1.0], [1.0, 2.0, 4.0], [[None, 9, 6], [9, 6, 3]], 12)

    png, svg = save_figure(figure, tmp_path / "grid")

    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["3", "6", "6", "9", "9"]
    assert axes.get_ylabel().endswith("%")
    assert axes.get_xlabel().endswith("%")
    assert len(axes.patches) == 1  # hatched: no switch
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "mine: epochs in FULL before the switch" in svg.read_text()


def test_grid_suggestions_and_pictures_are_of_one_run(baseline, capsys):
    assert main(["replay", str(baseline), str(baseline), "--grid", "1", "1"]) == EXIT_BAD_INPUT

    assert "accepted is one" in capsys.readouterr().err
