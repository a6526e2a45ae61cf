"""What a run of the trainer does and leaves behind, held on tiny runs through all three phases."""

import functools
import io
import itertools
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.scheduler.cosine_lr import CosineLRScheduler
from tiny_runs import MEASURED, PHASES, STEPS, TINY, finished, metrics, names, newest, outcome
from torch._dynamo.testing import CompileCounterWithBackend

from prelora import PreLoRAWarning
from prelora.analysis.records import load_run
from prelora.data import build_source
from prelora.optim import is_lora_group
from prelora.train import loop
from prelora.train.__main__ import main
from prelora.train.display import plain_warnings
from prelora.train.model import build_model

FIELDS = {
    "epoch", "step", "phase", "loss", "lr", "images", *MEASURED, "flops_per_image", "communication", "memory",
    "trainable", "norms", "base_norms", "lora_norms", "update", "eval", "ema_eval", "skipped_steps",
    "quarantined", "event",
}  # fmt: skip
EVENT_FIELDS = {
    "phase", "action", "reason", "norm_changes", "loss_changes", "update_ranks", "ranks", "released", "trainable_share",
    "switched_groups", "frozen_groups", "plan_flops",
}  # fmt: skip
TARGETS = [
    f"blocks.{block}.{name}"
    for name in ("attn.qkv[q]", "attn.qkv[k]", "attn.qkv[v]", "attn.proj", "mlp.fc1", "mlp.fc2")
    for block in range(2)
]
ONE_EPOCH = {"epochs": 1, "optim": {"warmup_epochs": 0}}


def watch_updates(patch, look):
    """Call ``look(trainer)`` after every optimizer step, its gradients still there; returns the results."""
    seen, update = [], loop.Trainer._update

    def watched(trainer):
        update(trainer)
        seen.append(look(trainer))

    patch.setattr(loop.Trainer, "_update", watched)
    return seen


def rate_of(group):
    return is_lora_group(group.get("name", "")), group["lr"]


@pytest.fixture(scope="module")
def rates():
    """By optimizer step of ``run``: of all groups, whether it is LoRA's, and the learning rate."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, rates):
    """A run with all that can be switched on, through all three phases."""
    data = {"mixup": 0.2, "cutmix": 0.2, "label_smoothing": 0.1}
    optim = {"clip_grad": 1.0, "min_lr": 1e-5}
    with pytest.MonkeyPatch.context() as patch:
        rates_seen = watch_updates(
            patch, lambda trainer: [rate_of(group) for group in trainer.pre.optimizer.param_groups]
        )
        output = finished(tmp_path_factory.mktemp("run") / "all", ema_decay=0.9, data=data, optim=optim)
    rates += rates_seen
    return output


# The record of a run.


def test_metrics_hold_one_line_an_epoch_with_every_documented_field(run):
    lines = metrics(run)

    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [set(line) for line in lines] == [FIELDS] * 6
    assert [set(line["event"]) for line in lines] == [EVENT_FIELDS] * 6


def test_a_run_goes_through_the_phases_in_order_and_notes_each_change(run):
    lines = metrics(run)

    assert [line["phase"] for line in lines] == PHASES
    assert [line["event"]["phase"] for line in lines] == [*PHASES[1:], "lora"]
    assert [line["event"]["action"] for line in lines] == ["none", "switch", "none", "freeze", "none", "none"]


def test_a_run_reads_back_as_the_report_reads_it(run):
    read = load_run(run)

    assert read.notes == ()
    assert [epoch.phase for epoch in read.epochs] == PHASES
    assert (read.info.world_size, read.info.global_batch, read.info.epochs) == (1, 160, 6)


def test_steps_images_and_rate_agree(run):
    for line in metrics(run):
        assert (line["step"], line["images"]) == (STEPS * line["epoch"], STEPS * 160)
        assert line["img_per_s"] == pytest.approx(line["images"] / line["seconds"])


def test_the_parts_of_a_steps_time_make_up_the_whole(run):
    for line in metrics(run):
        assert min(line["parts"].values()) >= 0
        assert sum(line["parts"].values()) == pytest.approx(line["seconds"], rel=0.1)
        assert min(line["parts"][part] for part in ("data", "forward", "backward", "optimizer")) > 0


def test_the_computing_rate_leaves_out_the_wait_for_images_and_stands_beside_the_peak(run):
    facts = json.loads((run / "run.json").read_text())
    plan = next(line["event"]["plan_flops"] for line in metrics(run) if line["event"]["plan_flops"])

    for line in metrics(run):
        computing = line["seconds"] - line["parts"]["data"]
        assert line["img_per_s_computing"] == pytest.approx(line["images"] / computing)
        assert line["flop_per_s"] == pytest.approx(line["img_per_s_computing"] * plan[line["phase"]])
        assert line["peak_share"] == pytest.approx(line["flop_per_s"] / facts["peak_flop_per_s"])


def test_every_target_has_its_norms_in_every_epoch(run):
    for line in metrics(run):
        switched = line["event"]["ranks"] != {} and line["event"]["action"] != "switch"
        assert list(line["norms"]) == list(line["base_norms"]) == list(line["update"]) == TARGETS
        assert list(line["lora_norms"]) == (TARGETS if switched else [])


def test_frozen_norms_stand_still_while_effective_ones_move(run):
    frozen, last = metrics(run)[3], metrics(run)[5]

    assert frozen["base_norms"] == last["base_norms"]
    assert [name for name in TARGETS if frozen["norms"][name] == last["norms"][name]] == []


@pytest.mark.parametrize("phase", ["full", "warmup", "lora"])
def test_an_epochs_record_is_of_the_phase_that_it_trained_in_also_where_it_ends(phase, run):
    first, second = [line for line in metrics(run) if line["phase"] == phase]

    assert second["trainable"] == first["trainable"]
    assert second["memory"] == first["memory"]


def test_the_freeze_shows_in_what_trains_and_in_memory_by_item(run):
    full, warmup, lora = (metrics(run)[epoch] for epoch in (0, 2, 4))

    assert lora["trainable"] < full["trainable"] < warmup["trainable"]
    assert full["memory"]["lora"] == 0 < warmup["memory"]["lora"] == lora["memory"]["lora"]
    for item in ("gradients", "optimizer"):
        assert lora["memory"][item] < full["memory"][item] < warmup["memory"][item]
    assert lora["memory"]["gradients"] == 4 * lora["trainable"]
    released = metrics(run)[3]["event"]["released"]
    assert warmup["memory"]["gradients"] - lora["memory"]["gradients"] == released["gradients"]


def test_tensorboard_holds_the_scalars_of_the_metrics(run):
    board = EventAccumulator(str(run / "tensorboard")).Reload()

    def scalars(tag):
        return {event.step: event.value for event in board.Scalars(tag)}

    lines = {line["epoch"]: line for line in metrics(run)}
    for tag, field in [
        ("train/loss", "loss"),
        ("train/lr", "lr"),
        ("train/trainable", "trainable"),
        ("train/flop_per_s", "flop_per_s"),
    ]:
        assert scalars(tag) == pytest.approx({epoch: line[field] for epoch, line in lines.items()})
    for tag, part, field in [
        ("eval/top1", "eval", "top1"),
        ("eval_ema/top5", "ema_eval", "top5"),
        (f"norm/{TARGETS[0]}", "norms", TARGETS[0]),
        (f"update/{TARGETS[-1]}", "update", TARGETS[-1]),
        ("memory/optimizer", "memory", "optimizer"),
        ("step/backward", "parts", "backward"),
    ]:
        assert scalars(tag) == pytest.approx({epoch: line[part][field] for epoch, line in lines.items()})


# The optimizer's steps.


def test_the_learning_rate_is_timms_cosine_of_the_step_for_every_group_in_every_phase(run, rates):
    base, lora = (
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": TINY.optim.lr * times}
        for times in (1.0, TINY.prelora.lora_lr_mult)
    )
    alone = torch.optim.SGD([base, lora])
    cosine = CosineLRScheduler(alone, t_initial=6 * STEPS, lr_min=1e-5, warmup_t=STEPS, t_in_epochs=False)

    assert len(rates) == 6 * STEPS
    assert len(rates[0]) < len(rates[-1])  # LoRA has groups of its own
    for step, groups in enumerate(rates):
        cosine.step_update(step)
        of_base, of_lora = (group["lr"] for group in alone.param_groups)
        expected = [of_lora if is_lora else of_base for is_lora, _ in groups]
        assert [rate for _, rate in groups] == pytest.approx(expected, rel=1e-12)
    assert [line["lr"] for line in metrics(run)] == [groups[0][1] for groups in rates[STEPS - 1 :: STEPS]]


def test_accumulating_half_batches_equals_whole_ones(tmp_path):
    sgd = {"name": "sgd", "lr": 0.05, "warmup_epochs": 0}
    whole = finished(tmp_path / "whole", epochs=1, optim=sgd)

    halves = finished(tmp_path / "halves", epochs=1, optim=sgd | {"accumulate": 2}, data={"batch_size": 80})

    assert metrics(halves)[0]["loss"] == pytest.approx(metrics(whole)[0]["loss"], rel=1e-6)
    assert metrics(halves)[0]["images"] == metrics(whole)[0]["images"]
    expected = newest(whole)["model"]
    torch.testing.assert_close(newest(halves)["model"], expected, rtol=1e-4, atol=1e-6)


def gradient_norm(trainer):
    parameters = [p for group in trainer.pre.optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_are_clipped_to_the_limit_in_every_phase(precision, tmp_path, monkeypatch):
    norms = watch_updates(monkeypatch, gradient_norm)

    finished(tmp_path / "run", precision=precision, optim={"clip_grad": 0.01})

    clipped = [norm for norm in norms if norm == norm]  # NaN: a step that the scaler left out
    assert len(clipped) >= 5 * STEPS
    assert clipped == pytest.approx([0.01] * len(clipped), rel=1e-3)


def test_gradients_are_left_alone_without_a_limit(tmp_path, monkeypatch):
    norms = watch_updates(monkeypatch, gradient_norm)

    finished(tmp_path / "run", **ONE_EPOCH)

    assert min(norms) > 0.1


@pytest.mark.parametrize("data", [{"mixup": 0.5}, {"cutmix": 0.5}, {"label_smoothing": 0.2}], ids=str)
def test_each_softening_of_images_and_labels_changes_what_is_learnt(data, tmp_path):
    plain = finished(tmp_path / "plain", **ONE_EPOCH)

    softened = finished(tmp_path / "softened", **ONE_EPOCH, data=data)

    assert metrics(softened)[0]["loss"] != pytest.approx(metrics(plain)[0]["loss"], abs=1e-4)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_runs_through_all_phases_on_fp32_weights(precision, dtype, tmp_path, monkeypatch):
    seen = set()

    def watched(output):
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(loop, "logits", watched)

    run = finished(tmp_path / "run", precision=precision)

    assert [line["phase"] for line in metrics(run)] == PHASES
    assert metrics(run)[5]["loss"] < metrics(run)[0]["loss"]
    assert seen == {dtype}
    state = newest(run)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    assert (state["train"]["scaler"] != {}) == (precision == "fp16")


# Evaluation.


@pytest.mark.parametrize(("record", "weights"), [("eval", "model"), ("ema_eval", "ema")])
def test_evaluation_is_over_every_held_out_image_with_the_weights_and_with_their_average(record, weights, tmp_path):
    run = finished(tmp_path / "run", **ONE_EPOCH, ema_decay=0.5, data={"mixup": 0.5}, model={"drop_rate": 0.5})

    model = build_model(TINY.model, classes=10, channels=1).eval()
    model.load_state_dict(newest(run)[weights])
    source = build_source("digits", image_size=8, seed=0)
    (images, labels), *_ = source.evaluate([torch.arange(360).numpy()])
    with torch.no_grad():
        output = model(images)
    ranked = output.argsort(dim=1, descending=True)
    assert metrics(run)[0][record] == {
        "loss": pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5),
        "top1": pytest.approx((ranked[:, 0] == labels).float().mean().item() * 100, rel=1e-5),
        "top5": pytest.approx((ranked[:, :5] == labels[:, None]).any(1).float().mean().item() * 100, rel=1e-5),
        "images": 360,
    }


def test_the_average_follows_weights_and_lora_at_its_decay_in_every_phase(tmp_path, monkeypatch):
    def weights_and_average(trainer):
        models = (trainer.pre.base_model, trainer.pre.ema.module)
        return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]

    steps = watch_updates(monkeypatch, weights_and_average)

    finished(tmp_path / "run", ema_decay=0.8)

    assert any("lora" in name for name in steps[-1][1])
    for (_, before), (weights, average) in itertools.pairwise(steps):
        for name in before:
            torch.testing.assert_close(average[name], 0.8 * before[name] + 0.2 * weights[name], rtol=1e-5, atol=1e-6)


def test_without_an_average_none_is_evaluated(tmp_path):
    assert metrics(finished(tmp_path / "run", **ONE_EPOCH))[0]["ema_eval"] is None


# Other ways to run.


def test_the_baseline_never_switches_but_is_monitored_alike(tmp_path):
    lines = metrics(finished(tmp_path / "run", method="full"))

    assert [line["phase"] for line in lines] == ["full"] * 6
    assert [line["event"]["action"] for line in lines] == ["none"] * 6
    assert [list(line["norms"]) for line in lines] == [TARGETS] * 6
    assert [len(line["event"]["loss_changes"]) for line in lines] == [0, 1, 1, 1, 1, 1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    soft = {"mixup": 0.5}
    first = finished(tmp_path / "first", seed=1, data=soft, model={"drop_path_rate": 0.1})

    again = finished(tmp_path / "again", seed=1, data=soft, model={"drop_path_rate": 0.1})
    other = finished(tmp_path / "other", seed=2, data=soft, model={"drop_path_rate": 0.1})

    assert outcome(first) == outcome(again)
    assert outcome(first)[0]["loss"] != outcome(other)[0]["loss"]


def test_what_is_left_out_of_the_comparison_is_measured_not_computed(run):
    assert set(MEASURED) < FIELDS


def test_a_transformers_vit_goes_through_all_phases(tmp_path):
    run = finished(tmp_path / "run", model={"library": "transformers", "drop_rate": 0.1})

    assert [line["phase"] for line in metrics(run)] == PHASES
    assert metrics(run)[5]["loss"] < metrics(run)[0]["loss"]
    assert "classifier.weight" in newest(run)["model"]


def test_the_papers_five_groups_go_through_all_phases(tmp_path):
    run = finished(tmp_path / "run", targets="paper")

    assert [line["phase"] for line in metrics(run)] == PHASES
    assert list(metrics(run)[1]["event"]["norm_changes"]) == ["query", "key", "value", "output", "dense"]


def test_a_compiled_run_goes_through_all_phases_and_learns_what_an_eager_one_does(tmp_path, monkeypatch):
    # Inductor gives the same losses here, for a minute of C++ compiler; what can go wrong at a switch is Dynamo's.
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    eager = finished(tmp_path / "eager")

    compiled = finished(tmp_path / "compiled", compile=True)

    assert backend.frame_count == 3  # once a phase
    assert [line["phase"] for line in metrics(compiled)] == PHASES
    losses = [line["loss"] for line in metrics(eager)]
    assert [line["loss"] for line in metrics(compiled)] == pytest.approx(losses, rel=1e-4)


# Checkpoints that stay.


@pytest.mark.parametrize(
    ("top1", "every_epochs", "keep_last", "expected"),
    [
        ([10, 50, 20, 30, 40], 1, 1, [5, 2]),
        ([10, 50, 20, 30, 40], 1, 2, [5, 4, 2]),
        ([10, 50, 20, 30, 40], 2, 1, [5, 2]),
        ([90, 50, 20, 30, 40], 2, 1, [5, 2]),  # the best was never written
        ([10, 20, 30, 40, 50], 1, 1, [5]),
        ([50, 50, 20, 50, 40], 1, 1, [5, 4]),
    ],
)
def test_the_last_n_checkpoints_and_the_best_stay(top1, every_epochs, keep_last, expected, tmp_path, monkeypatch):
    scores = iter(top1)
    monkeypatch.setattr(
        loop, "evaluate", lambda *_, **__: {"loss": 1.0, "top1": next(scores), "top5": 90.0, "images": 360}
    )

    checkpoint = {"every_epochs": every_epochs, "keep_last": keep_last}
    run = finished(tmp_path / "run", epochs=5, method="full", checkpoint=checkpoint)

    assert names(run) == [f"step-{STEPS * epoch:09d}" for epoch in expected]


def test_the_switch_and_the_freeze_are_always_written(tmp_path, monkeypatch):
    written, save = [], loop.save_together
    monkeypatch.setattr(loop, "save_together", lambda path, *rest: written.append(path.name) or save(path, *rest))

    finished(tmp_path / "run", checkpoint={"every_epochs": 5})

    assert written == [f"step-{STEPS * epoch:09d}" for epoch in (2, 4, 5, 6)]


# What a user sees.


def test_the_terminal_gets_a_line_an_epoch_and_what_to_do_next(tmp_path, capsys):
    run = finished(tmp_path / "run")

    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    for line, (epoch, phase) in zip([x for x in lines if x.startswith("epoch")], enumerate(PHASES, 1), strict=True):
        assert line.startswith(f"epoch   {epoch}/6 {phase}")
        assert [word for word in ("loss", "top-1", "img/s", "ETA") if word not in line] == []
    assert [line.split()[0] for line in lines if line.startswith("  ")] == ["switch:", "freeze:"]
    assert lines[-1] == f"Finished. Next: prelora export {run}, prelora report {run}"
    assert shown.err == ""


def test_a_terminal_gets_a_bar_with_phase_loss_rate_and_time_left(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)

    finished(tmp_path / "run")

    drawn = terminal.getvalue()
    for epoch, phase in enumerate(PHASES, 1):
        assert f"epoch {epoch}/6 {phase}" in drawn
    assert [word for word in ("step/s", "loss 2.", "img/s", "ETA 0:0") if word not in drawn] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prelora": {"tau": 1e-9}}, "The convergence test never passed: the run stayed at full rank"),
        ({"prelora": {"warmup_epochs": 10}}, "The run ended within the warm-up: not all was frozen"),
        ({"method": "full"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_run_that_did_not_get_to_lora_says_so(changes, said, tmp_path, capsys):
    finished(tmp_path / "run", **changes)

    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(said or "epoch   6/6")


def test_a_warning_of_ours_is_one_line_for_a_user_and_others_are_as_they_were():
    def formatted():
        return [warnings.formatwarning("so", kind, "file.py", 3, "code") for kind in (PreLoRAWarning, UserWarning)]

    before = formatted()
    with plain_warnings():
        within = formatted()

    assert within == ["prelora: warning: so\n", before[1]]
    assert formatted() == before


# The plan.


def test_the_plan_of_vit_l_prints_its_known_numbers(capsys):
    assert main(["--recipe", "vit_large_imagenet", "--dry-run"]) == 0

    plan = capsys.readouterr().out
    (row,) = [line.split() for line in plan.splitlines() if line.startswith("64 ")]
    assert "304.33 M parameters" in plan
    assert "1,281,167 training images, 1000 classes" in plan
    assert [row[1], " ".join(row[2:4]), row[5], row[8]] == ["30.43", "(10.00 %)", "369.02", "1.35×"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "epoch 10 at the earliest"),
        ("--prelora.min-epoch 13", "epoch 14 at the earliest"),
        ("--prelora.deadline 30", "epoch 30 at the latest"),
        ("--epochs 9", "epoch 10 at the earliest (the run ends after epoch 9)"),
        ("--method full", "FULL          to the end: the baseline never switches"),
    ],
)
def test_a_plan_says_when_the_run_can_switch(options, said, capsys):
    assert main(["--dry-run", *options.split()]) == 0

    assert said in capsys.readouterr().out


def test_a_plan_writes_nothing(tmp_path):
    assert main(["--dry-run", "--output", str(tmp_path / "run")]) == 0

    assert list(tmp_path.iterdir()) == []
