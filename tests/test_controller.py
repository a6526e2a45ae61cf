"""PreLoRA takes a model through FULL, WARMUP and LORA exactly when its config says, and changes nothing unasked."""

import copy
import math

import models
import pytest
import torch
from models import epochs, start, train, until
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prelora import OptimizerError, PreLoRA, monitor, surgery
from prelora.nn import LoRALinear
from prelora.surgery import is_lora


@pytest.mark.parametrize(
    ("fields", "switch", "freeze"),
    [
        ({"warmup_epochs": 1}, 2, 3),
        ({"warmup_epochs": 0}, 2, 2),
        ({"warmup_epochs": 3}, 2, 5),
        ({"k": 3}, 3, 4),
        ({"m": 2}, 4, 5),
        ({"k": 3, "m": 2}, 6, 7),
        ({"monitor_from": 3}, 5, 6),
        ({"monitor_from": 1, "m": 2}, 5, 6),
        ({"min_epoch": 4}, 4, 5),
        ({"min_epoch": 5, "m": 2}, 6, 7),
        ({"tau": 1e-9, "deadline": 3}, 3, 4),
        ({"tau": 1e-9, "deadline": 5, "m": 3, "warmup_epochs": 0}, 5, 5),
        ({"zeta": 1e-9, "deadline": 4, "monitor_from": 2}, 4, 5),
        ({"tau": 1e-9}, None, None),
        ({"zeta": 1e-9}, None, None),
    ],
)
def test_phases_change_exactly_when_the_config_says(fields, switch, freeze):
    pre = start(fields=fields)

    events = epochs(pre, 8)

    assert [event.epoch for event in events] == list(range(1, 9))
    expected = [(switch, "switch"), (freeze, "freeze")] if switch != freeze else [(switch, "switch+freeze")]
    actions = [(event.epoch, event.action) for event in events if event.action != "none"]
    assert actions == ([] if switch is None else expected)
    phases = ["lora" if freeze and e >= freeze else "warmup" if switch and e >= switch else "full" for e in range(1, 9)]
    assert [event.phase for event in events] == phases
    assert (pre.switch_epoch, pre.epoch, pre.step) == (switch, 8, 16)


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"warmup_epochs": 2, "monitor_from": 1}, ["monitoring starts after epoch 1", "1 of 2 windows complete",
            "every change is within tau and zeta", "warm-up epoch 1 of 2", "warm-up epoch 2 of 2", "training LoRA"]),
        ({"m": 2, "min_epoch": 5}, ["window of 2 epochs not complete", "1 of 2 windows complete", "window of 2 epochs",
            "passed, but epoch 4 is before min_epoch = 5", "window of 2 epochs", "every change is within"]),
        ({"tau": 1e-9, "deadline": 3}, ["1 of 2 windows", "norm of q changed by",
            "forced by deadline = 3; norm of q changed by", "warm-up epoch 1 of 1"]),
    ],
)  # fmt: skip
def test_every_event_says_why(fields, reasons):
    events = epochs(start(fields=fields), len(reasons))

    found = [event.reason[: len(reason)] for event, reason in zip(events, reasons, strict=True)]
    assert found == reasons


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 0.0])
def test_a_loss_that_is_no_number_is_not_convergence_and_no_error(loss):
    pre = start()
    train(pre)
    pre.end_epoch(1.0)
    train(pre)

    event = pre.end_epoch(loss)

    assert (event.phase, event.action) == ("full", "none")
    assert (
        event.reason == "loss: change between windows 1 and 2 of 2 is undefined (a value is not finite, or about zero)"
    )
    assert repr(event.loss) == repr(loss)


def test_a_weight_that_is_no_number_is_not_convergence_and_no_error():
    pre = start()
    epochs(pre, 1)
    with torch.no_grad():
        pre.model.blocks[1].mlp.fc1.weight[0, 0] = math.nan

    event = pre.end_epoch(1.0)

    assert event.phase == "full"
    assert event.reason.startswith("norm of mlp_in: change between windows 1 and 2 of 2 is undefined")


def test_the_event_holds_the_norms_the_changes_and_the_plan():
    pre = start()
    first, second, third = epochs(pre, 3)

    now = monitor.measure(pre.base_model, pre.targets)
    assert (third.norms.base, third.norms.lora, third.norms.effective) == (now.base, now.lora, now.effective)
    means = [sum(event.norms.effective[f"blocks.{i}.mlp.fc1"] for i in range(3)) / 3 for event in (first, second)]
    assert second.norm_changes["mlp_in"] == pytest.approx([(means[1] - means[0]) / means[0] * 100])
    assert set(second.norm_changes) == {"q", "k", "v", "attn_out", "mlp_in", "mlp_out"}
    assert second.loss_changes == pytest.approx([(second.loss - first.loss) / first.loss * 100])
    assert (first.norm_changes, first.loss_changes, third.norm_changes, third.loss_changes) == ({}, (), {}, ())
    assert (first.ranks, first.norms.lora) == ({}, {})
    assert second.ranks == third.ranks == pre.ranks == surgery.realised_ranks(pre.base_model, pre.targets)
    assert {min(pre.ranks.values()), max(pre.ranks.values())} == {2, 8}
    assert all(0 < update < 0.1 for update in third.norms.update.values())


def test_the_event_counts_what_trains_and_what_the_freeze_released():
    pre = start()
    total = sum(p.numel() for p in pre.model.parameters())
    full, switch, freeze = epochs(pre, 3)

    named = dict(pre.model.named_parameters())
    base = sum(
        named[f"{t.path}.{part}"].numel()
        for t in {t.path: t for t in pre.targets}.values()
        for part in ("weight", "bias")
    )
    lora = sum(p.numel() for name, p in named.items() if is_lora(name))
    assert [event.trainable for event in (full, switch, freeze)] == [total, total + lora, total - base + lora]
    assert freeze.trainable_share == (total - base + lora) / total
    assert (full.released, switch.released) == ({}, {})
    # fp32 gradients; exp_avg, exp_avg_sq and step of 12 weights and 12 biases
    assert freeze.released == {"gradients": 4 * base, "optimizer_state": 8 * base + 24 * 4}


def test_a_loss_may_be_a_tensor():
    assert start().end_epoch(torch.tensor(2.5)).loss == 2.5


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_goes_through_all_phases_and_gives_a_stock_model_back(family):
    pre = start(family)
    initial = copy.deepcopy(pre.model.state_dict())

    events = epochs(pre, 4)

    assert [event.phase for event in events] == ["full", "warmup", "lora", "lora"]
    stock = models.FAMILIES[family](seed=7).eval()
    stock.load_state_dict(pre.merged_state_dict(), strict=True)
    x = models.images()
    torch.testing.assert_close(models.logits(stock, x), models.logits(pre.model.eval(), x), rtol=0, atol=1e-5)
    assert not any(torch.equal(tensor, initial[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_goes_through_all_phases_as_the_plain_one_does(backend):
    torch._dynamo.reset()
    plain, compiled = start(), start(wrap=lambda model: torch.compile(model, backend=backend))

    expected, found = epochs(plain, 4), epochs(compiled, 4)

    assert found == expected
    assert compiled.model._orig_mod is compiled.base_model
    assert all(map(torch.equal, compiled.base_model.parameters(), plain.base_model.parameters()))


def test_bf16_autocast_goes_through_all_phases():
    pre = start()

    events = epochs(pre, 4, autocast=True)

    assert [event.phase for event in events] == ["full", "warmup", "lora", "lora"]
    assert {p.dtype for p in pre.model.parameters()} == {torch.float32}
    assert all(0 < norm < math.inf for norm in events[-1].norms.lora.values())


def test_in_the_warm_up_base_and_lora_train_together():
    pre = start(fields={"warmup_epochs": 2})
    until(pre, "warmup")
    before = {name: p.detach().clone() for name, p in pre.model.named_parameters()}
    epochs(pre, 1)

    assert not any(torch.equal(p, before[name]) for name, p in pre.model.named_parameters())


@pytest.mark.parametrize("freeze", ["targets", "all"])
def test_in_every_phase_the_optimizer_holds_exactly_what_trains(freeze):
    pre = start(fields={"freeze": freeze})

    for phase in ("full", "warmup", "lora"):
        until(pre, phase)
        train(pre)
        trains = {parameter for parameter in pre.model.parameters() if parameter.requires_grad}
        assert {parameter for group in pre.optimizer.param_groups for parameter in group["params"]} == trains
        assert set(pre.optimizer.state) == trains


def test_freezing_all_leaves_lora_alone_to_train():
    pre = start(fields={"freeze": "all"})
    event = until(pre, "lora")
    before = {name: p.detach().clone() for name, p in pre.model.named_parameters()}
    train(pre)

    moved = {name for name, p in pre.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if is_lora(name)}
    assert event.trainable == sum(before[name].numel() for name in moved)


@pytest.mark.parametrize(("freeze", "budget"), [("targets", 0.20), ("all", 0.06)])
def test_the_trainable_share_keeps_the_budget(freeze, budget):
    free = until(start(fields={"freeze": freeze}), "lora")
    event = until(start(fields={"freeze": freeze, "budget": budget}), "lora")

    assert event.trainable_share <= budget < free.trainable_share
    assert event.trainable_share > 0.9 * budget


def test_the_configs_options_reach_lora_and_its_group():
    pre = start(fields={"alpha": 5.0, "lora_dropout": 0.25, "lora_lr_mult": 3.0, "r_max": 4})
    until(pre, "warmup")

    layer = pre.model.blocks[0].mlp.fc1
    assert (layer.alpha, layer.dropout) == (5.0, 0.25)
    assert max(pre.ranks.values()) == 4
    groups = {group["name"]: group for group in pre.optimizer.param_groups}
    assert groups["group0/lora"]["lr"] == 3.0 * groups["group0"]["lr"]


def test_a_comes_from_the_seed_alone():
    first, second, other = (start(seed=seed) for seed in (1, 1, 2))
    for pre in (first, second, other):
        torch.manual_seed(torch.seed())
        until(pre, "warmup")

    a = [pre.model.blocks[0].mlp.fc1.lora_A for pre in (first, second, other)]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])


def test_targets_may_be_given():
    pre = start(targets={"mlp": ["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]})
    until(pre, "warmup")

    lora = {name for name, module in pre.model.named_modules() if isinstance(module, LoRALinear)}
    assert lora == {f"blocks.{i}.mlp.fc{j}" for i in range(3) for j in (1, 2)}


def test_without_log_updates_nothing_is_copied_or_measured():
    pre = start(fields={"log_updates": False})

    events = epochs(pre, 3)

    assert [event.norms.update for event in events] == [{}, {}, {}]
    assert pre.state_dict()["snapshot"] is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("as_tuple", [True, False])
def test_the_probe_leaves_every_modules_mode_as_it_was(training, as_tuple):
    pre = start()
    pre.model.train(training)
    pre.model.head.train(not training)
    probe = (models.images(),) if as_tuple else models.images()
    for _ in range(2):
        train(pre)
        event = pre.end_epoch(1.0, probe)

    assert event.action == "switch"
    modes = {name: module.training for name, module in pre.model.named_modules()}
    assert {name for name, mode in modes.items() if mode != training} == {"head"}


def test_an_injection_that_changes_the_logits_is_an_error(monkeypatch):
    original = surgery.inject

    def broken(model, *arguments, **options):
        added = original(model, *arguments, **options)
        with torch.no_grad():
            model.blocks[2].mlp.fc2.weight[0, 0] += 1e-3
        return added

    monkeypatch.setattr(surgery, "inject", broken)
    pre = start()
    epochs(pre, 1)

    with pytest.raises(RuntimeError, match="injection changed the logits by up to"):
        epochs(pre, 1)


def ema_of(cls):
    """An average that is a tenth of the newest weights."""
    if cls is ModelEmaV3:
        return lambda model: ModelEmaV3(model, decay=0.9)
    return lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@pytest.mark.parametrize("cls", [ModelEmaV3, AveragedModel])
def test_the_average_is_extended_and_never_restarted(cls):
    pre = start(ema=ema_of(cls))
    epochs(pre, 1)
    loss = train(pre)
    average = pre.ema.module
    before, logits = copy.deepcopy(average.state_dict()), average.eval()(models.images())

    event = pre.end_epoch(loss)

    after = average.state_dict()
    assert event.action == "switch"
    assert pre.ema.module is average
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name for name in after if name not in before} == {n for n, _ in pre.model.named_parameters() if is_lora(n)}
    assert torch.equal(average(models.images()), logits)
    assert not torch.equal(average.head.weight, pre.model.head.weight)
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.parametrize("phase", ["warmup", "lora"])
@pytest.mark.parametrize("cls", [ModelEmaV3, AveragedModel])
def test_the_average_goes_on_over_every_weight_and_lora(cls, phase):
    pre = start(ema=ema_of(cls), fields={"warmup_epochs": 2})
    until(pre, phase)
    before = copy.deepcopy(pre.ema.module.state_dict())
    train(pre, steps=1)

    newest, after = pre.model.state_dict(), pre.ema.module.state_dict()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * newest[name], rtol=1e-5, atol=1e-7)
    assert after["blocks.1.mlp.fc1.lora_B"].any()


def test_the_merged_state_dict_of_the_average_makes_a_stock_model_of_its_function():
    pre = start(ema=ema_of(ModelEmaV3))
    until(pre, "lora")
    epochs(pre, 1)
    stock = models.tiny_vit(seed=7).eval()
    stock.load_state_dict(pre.merged_state_dict(ema=True), strict=True)

    x = models.images()
    torch.testing.assert_close(stock(x), pre.ema.module(x), rtol=0, atol=1e-5)
    assert (stock(x) - pre.model.eval()(x)).abs().max() > 1e-3


def test_there_is_no_merged_state_dict_of_an_average_that_is_not_there():
    with pytest.raises(ValueError, match=r"merged_state_dict\(ema=True\): PreLoRA was given no ema"):
        start().merged_state_dict(ema=True)


@pytest.mark.parametrize(
    ("total_steps", "steps", "length"),
    [(1004, 2, 10), (1100, 50, 10), (204, 2, 2), (10**6, 2, 500), (4, 2, 0), (2, 2, 0), (None, 2, 0), (None, 150, 3)],
)
def test_lora_alone_is_ramped_over_one_percent_of_the_steps_that_remain(total_steps, steps, length):
    pre = start(total_steps=total_steps, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), fields={"lora_lr_mult": 2.0})
    for _ in range(2):
        for _ in range(steps):
            pre.optimizer.step()
        event = pre.end_epoch(1.0)
        with torch.no_grad():
            for i, block in enumerate(pre.model.blocks, start=1):
                for parameter in block.parameters():
                    parameter.mul_(1 + i / 1000)
    assert event.action == "switch"
    rates = []
    pre.optimizer.register_step_pre_hook(lambda o, *_: rates.append({g["name"]: g["lr"] for g in o.param_groups}))

    for _ in range(5):
        pre.optimizer.step()

    assert [rate["group0"] for rate in rates] == [0.01] * 5
    ramp = [min(1.0, (i + 1) / length) if length else 1.0 for i in range(5)]
    assert [rate["group0/lora"] for rate in rates] == pytest.approx([0.02 * factor for factor in ramp])
    assert {group["name"]: group["lr"] for group in pre.optimizer.param_groups} == {"group0": 0.01, "group0/lora": 0.02}


def test_the_ramp_starts_at_the_switch_and_does_not_restart_at_the_freeze():
    pre = start(total_steps=604, fields={"lora_lr_mult": 1.0})
    until(pre, "warmup")
    seen = []
    for _ in range(2):
        hook = lambda optimizer, *_: seen.append(optimizer.param_groups[-1]["lr"] / 1e-3)  # noqa: E731
        handle = pre.optimizer.register_step_pre_hook(hook)
        train(pre, steps=3)
        handle.remove()
        pre.end_epoch(1.0)

    assert pre.phase == "lora"
    assert seen == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])


def failing_step(pre):
    def closure():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        pre.optimizer.step(closure)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("phase", ["warmup", "lora"])
def test_a_step_that_raised_leaves_no_ramp_to_the_step_after_it(phase):
    pre = start(total_steps=10_000)
    until(pre, phase)
    seen = []
    pre.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(rates(optimizer)))

    failing_step(pre)
    train(pre, steps=1)

    assert seen[0] == seen[1] != rates(pre.optimizer)


def test_a_step_that_raised_leaves_no_ramp_in_a_state():
    pre = start(total_steps=10_000)
    until(pre, "warmup")
    before = rates(pre.optimizer)

    failing_step(pre)

    assert [group["lr"] for group in pre.state_dict()["optimizer"]["groups"]] == before


def test_a_step_that_raised_leaves_no_ramp_over_the_freeze():
    pre = start(total_steps=10_000, fields={"warmup_epochs": 1})
    until(pre, "warmup")
    before = {group["name"]: group["lr"] for group in pre.optimizer.param_groups}

    train(pre)
    failing_step(pre)

    assert pre.end_epoch(1.0).action == "freeze"
    assert all(group["lr"] == before[group["name"]] for group in pre.optimizer.param_groups)


def test_a_step_that_raised_leaves_nothing_to_a_state_loaded_after_it():
    saved = start(total_steps=10_000)
    until(saved, "warmup")
    pre = start(total_steps=10_000, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.0))
    seen = []

    failing_step(pre)
    pre.load_state_dict(saved.state_dict())
    for each in (saved, pre):
        each.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(rates(optimizer)))
        train(each, steps=1)

    assert seen[0] == seen[1]


def test_the_schedule_is_carried_through_every_phase():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)

    pre = start(scheduler=scheduler, fields={"lora_lr_mult": 1.0})
    untouched = start(scheduler=scheduler, fields={"tau": 1e-9})
    for _ in range(5):
        epochs(pre, 1)
        epochs(untouched, 1)
        rates = {group["lr"] for group in pre.optimizer.param_groups}
        assert rates == {untouched.optimizer.param_groups[0]["lr"]}

    assert pre.phase == "lora"
    assert pre.scheduler.optimizer is pre.optimizer


class Plateau:
    """Not one of torch's or timm's schedulers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheduler": Plateau}, OptimizerError, "Plateau cannot be carried over"),
        ({"optimizer": torch.optim.LBFGS}, OptimizerError, "LBFGS keeps one flat history"),
        (
            {"optimizer": lambda p: torch.optim.SGD(list(p)[-2:], lr=0.1)},
            OptimizerError,
            r"does not hold the weights of 18 targets, as blocks\.0\.attn\.qkv\[q\]",
        ),
        ({"ema": lambda _: ModelEmaV3(models.deit())}, ValueError, "ema.module are not the model's"),
        ({"wrap": torch.nn.DataParallel}, TypeError, "DataParallel is not supported"),
        ({"targets": {"q": "blocks.*.gone"}}, ValueError, r"'blocks\.0\.gone' matches no module"),
    ],
)
def test_what_cannot_go_through_the_switch_is_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        start(**options)


def test_without_a_config_it_runs_the_papers_exp2():
    model = models.tiny_vit()
    pre = PreLoRA(model, torch.optim.SGD(model.parameters()))

    assert (pre.config.tau, pre.config.zeta, pre.config.warmup_epochs) == (0.5, 2.5, 10)


def test_lora_fa_trains_b_alone_after_the_freeze_and_resumes():
    pre = models.start(fields={"train_lora_a": False})
    models.until(pre, "lora")
    frozen = {name: p.detach().clone() for name, p in pre.base_model.named_parameters() if name.endswith("lora_A")}
    resumed = models.start(fields={"train_lora_a": False})
    resumed.load_state_dict(copy.deepcopy(pre.state_dict()))

    models.train(pre)
    models.train(resumed)

    held = {id(p) for group in pre.optimizer.param_groups for p in group["params"]}
    for name, parameter in pre.base_model.named_parameters():
        if name.endswith("lora_A"):
            assert id(parameter) not in held
            assert torch.equal(parameter, frozen[name])
        assert torch.equal(parameter, resumed.base_model.get_parameter(name)), name


def test_explain_tells_each_targets_plan_and_why():
    pre = models.start(fields={"execution": "merged"})
    assert pre.explain() == {}
    models.until(pre, "warmup")
    models.train(pre)

    plans = pre.explain()

    assert plans.keys() == {target.path for target in pre.targets}
    assert {(plan.execution, plan.reason) for plan in plans.values()} == {("merged", "asked for")}


@pytest.mark.parametrize("execution", ["merged", "two_path"])
def test_either_execution_takes_a_run_through_all_phases_to_one_function(execution):
    pre = models.start(fields={"execution": execution})
    models.until(pre, "lora")
    models.train(pre)

    plain = models.tiny_vit()
    plain.load_state_dict(pre.merged_state_dict())
    x = models.images()
    torch.testing.assert_close(plain(x), pre.model(x), rtol=1e-4, atol=1e-5)


def test_without_lora_the_warm_up_is_full_training_and_the_freeze_leaves_the_targets_as_they_stand():
    pre, plain = (start(fields={"assignment": assignment, "warmup_epochs": 2, "tau": tau})
                  for assignment, tau in (("none", 1e4), ("change", 1e-9)))  # fmt: skip
    for each in (pre, plain):
        epochs(each, 4)
    assert pre.phase == "lora"
    joint = {name: parameter.clone() for name, parameter in pre.base_model.named_parameters()}

    epochs(pre, 2)

    assert set(pre.ranks.values()) == {0}
    frozen = {f"{target.path}.weight" for target in pre.targets}
    for name, parameter in plain.base_model.named_parameters():
        assert torch.equal(parameter, joint[name])
    for name, parameter in pre.base_model.named_parameters():
        assert torch.equal(parameter, joint[name]) == (name in frozen or not parameter.requires_grad)
