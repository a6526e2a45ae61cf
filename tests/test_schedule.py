"""Learning rates are a pure function of the step: neither a scheduler nor a gradient scaler notices the switch."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler, PlateauLRScheduler
from torch import nn
from torch.optim import lr_scheduler

from prelora import OptimizerError
from prelora.optim import check_schedulable, rebuild_optimizer, rebuild_scheduler
from prelora.ramp import LoRARamp, Ramp

pytestmark = pytest.mark.filterwarnings("error:Seems like")
STEPS = 24


class Net(nn.Module):
    """A weight for each group, and the LoRA that will adapt the first two."""

    def __init__(self):
        super().__init__()
        for name in ("a", "b", "c", "a_lora", "b_lora"):
            self.register_parameter(name, nn.Parameter(torch.ones(3)))


ADDED = {"a_lora": "a", "b_lora": "b"}
RATES = {"a": 0.4, "b": 0.1, "c": 0.03}


def optimizer_of(model, cls=torch.optim.SGD, **options):
    groups = [{"params": [getattr(model, name)], "name": name, "lr": lr} for name, lr in RATES.items()]
    return cls(groups, **({"momentum": 0.9} if cls is torch.optim.SGD else {}) | options)


def sequential(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
    return lr_scheduler.SequentialLR(optimizer, [warm, lr_scheduler.CosineAnnealingLR(optimizer, 18)], milestones=[6])


def chained(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
    return lr_scheduler.ChainedScheduler([warm, lr_scheduler.ExponentialLR(optimizer, 0.9)], optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.9**t, lambda t: 1.0]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.8, 0.2, 0.06], total_steps=STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.4, 0.1, 0.03], [0.8, 0.2, 0.06], step_size_up=4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 12, 18], 0.3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, STEPS, 2.0),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1, min_lr=[0.1, 0.01, 0.0]),
    "timm cosine": lambda o: CosineLRScheduler(o, STEPS, warmup_t=5, warmup_lr_init=0.0, t_in_epochs=False),
}


def advance(scheduler, step):
    if isinstance(scheduler, CosineLRScheduler):
        scheduler.step_update(step + 1)
    elif isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def run(optimizer, scheduler, steps, record):
    for step in steps:
        optimizer.step()
        advance(scheduler, step)
        for group in optimizer.param_groups:
            record.setdefault(group["name"], []).append((group["lr"], group.get("momentum")))


@pytest.fixture(params=SCHEDULERS)
def schedule(request):
    return SCHEDULERS[request.param]


@pytest.mark.parametrize("switch", [3, 7, 15])
@pytest.mark.parametrize("lr_mult", [1.0, 3.0])
def test_every_group_gets_its_untouched_runs_rate_and_lora_a_multiple(schedule, switch, lr_mult):
    untouched, model, expected, found = Net(), Net(), {}, {}
    optimizer = optimizer_of(untouched)
    run(optimizer, schedule(optimizer), range(STEPS), expected)

    optimizer = optimizer_of(model)
    scheduler = schedule(optimizer)
    run(optimizer, scheduler, range(switch), found)
    optimizer, parents = rebuild_optimizer(optimizer, model, added=ADDED, lr_mult=lr_mult)
    scheduler = rebuild_scheduler(scheduler, optimizer, parents)
    run(optimizer, scheduler, range(switch, switch + 4), found)
    optimizer, parents = rebuild_optimizer(optimizer, model, dropped={"a"})
    scheduler = rebuild_scheduler(scheduler, optimizer, parents)
    run(optimizer, scheduler, range(switch + 4, STEPS), found)

    assert {name: found[name] for name in ("b", "c")} == {name: expected[name] for name in ("b", "c")}
    assert found["a"] == expected["a"][: switch + 4]
    for name in ("a", "b"):
        rates = [lr for lr, _ in found[f"{name}/lora"]]
        assert rates == pytest.approx([lr_mult * lr for lr, _ in expected[name][switch:]], rel=1e-12, abs=1e-15)
        assert [momentum for _, momentum in found[f"{name}/lora"]] == [m for _, m in expected[name][switch:]]


def test_every_schedule_above_really_moves(schedule):
    optimizer, found = optimizer_of(Net()), {}
    run(optimizer, schedule(optimizer), range(STEPS), found)

    assert len(set(found["a"])) > 2


def test_a_rebuilt_scheduler_reports_the_last_rates_of_every_group(schedule):
    model = Net()
    optimizer = optimizer_of(model)
    scheduler = schedule(optimizer)
    run(optimizer, scheduler, range(4), {})
    optimizer, parents = rebuild_optimizer(optimizer, model, added=ADDED, lr_mult=2.0)

    rebuilt = rebuild_scheduler(scheduler, optimizer, parents)

    assert type(rebuilt) is type(scheduler)
    last = getattr(rebuilt, "_last_lr", [group["lr"] for group in optimizer.param_groups])
    assert last == pytest.approx([group["lr"] for group in optimizer.param_groups])


def test_beta1_is_cycled_for_lora_too():
    model = Net()
    optimizer = optimizer_of(model, torch.optim.Adam)
    scheduler = lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=4, base_momentum=[0.7, 0.8, 0.9])
    optimizer, parents = rebuild_optimizer(optimizer, model, added=ADDED, dropped={"a"})
    scheduler = rebuild_scheduler(scheduler, optimizer, parents)

    for _ in range(4):
        optimizer.step()
        scheduler.step()

    assert [(group["name"], group["betas"][0]) for group in optimizer.param_groups] == [
        ("a/lora", 0.7),
        ("b", 0.8),
        ("b/lora", 0.8),
        ("c", 0.9),
    ]


def test_an_unknown_scheduler_is_refused():
    with pytest.raises(OptimizerError, match="str cannot be carried over; accepted are torch's LR"):
        check_schedulable("cosine", optimizer_of(Net()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_timms_plateau_scheduler_is_refused_for_it_hides_another_scheduler():
    optimizer = optimizer_of(Net())

    with pytest.raises(OptimizerError, match="PlateauLRScheduler cannot be carried over"):
        check_schedulable(PlateauLRScheduler(optimizer), optimizer)


def test_a_scheduler_of_another_optimizer_is_refused(schedule):
    with pytest.raises(OptimizerError, match="schedules another optimizer than the one given"):
        check_schedulable(schedule(optimizer_of(Net())), optimizer_of(Net()))


def test_a_scheduler_of_the_optimizer_passes(schedule):
    optimizer = optimizer_of(Net())

    check_schedulable(schedule(optimizer), optimizer)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 4, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (2, 2, [None, None, 0.5, 1.0, 1.0, 1.0]),
        (0, 1, [1.0] * 6),
        (3, 0, [1.0] * 6),
    ],
)
def test_the_ramp_is_a_pure_function_of_the_step(start, length, expected):
    ramp = Ramp(start, length)

    found = [ramp.factor(step) for step in (5, 4, 3, 2, 1, 0, 5)]

    assert [x for x, y in zip(found[5::-1], expected, strict=True) if y is not None] == [x for x in expected if x]
    assert found[0] == found[-1]


def test_the_ramp_scales_lora_alone_while_the_step_runs_and_no_scheduler_sees_it():
    model, moved, found, expected = Net(), [], [], []
    rebuilt, _ = rebuild_optimizer(optimizer_of(model, momentum=0.0), model, added=ADDED, lr_mult=2.0)
    untouched = optimizer_of(Net(), momentum=0.0)
    scheduler, reference = (lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (rebuilt, untouched))
    ramp = LoRARamp()
    ramp.begin(rebuilt, Ramp(start=10, length=4))

    for step in range(10, 16):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones(3)
        ramp.before(rebuilt, step)
        rebuilt.step()
        ramp.after(rebuilt)
        scheduler.step()
        untouched.step()
        reference.step()
        moved.append({name: (before[name] - p).mean().item() for name, p in model.named_parameters()})
        found.append([group["lr"] for group in rebuilt.param_groups if not group["name"].endswith("/lora")])
        expected.append([group["lr"] for group in untouched.param_groups])

    assert found == expected
    for name in ("a", "b"):
        ratios = [step[f"{name}_lora"] / step[name] for step in moved]
        assert ratios == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rel=1e-5)


def test_a_grad_scaler_goes_on_across_the_switch():
    scales, weights = [], []
    for switch in (None, 3):
        model, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        optimizer, scale = optimizer_of(model), []
        for step in range(8):
            if step == switch:
                optimizer, _ = rebuild_optimizer(optimizer, model, added=ADDED)
            optimizer.zero_grad()
            factor = float("inf") if step == 5 else step + 1.0
            scaler.scale(factor * sum(p.sum() for p in (model.a, model.b, model.c))).backward()
            scaler.step(optimizer)
            scaler.update()
            scale.append(scaler.get_scale())
        scales.append(scale)
        weights.append(torch.stack([model.a, model.b, model.c]))

    # Doubled every second step, halved and no step taken at the infinite gradient.
    assert scales[0] == scales[1] == [4.0, 8.0, 8.0, 16.0, 16.0, 8.0, 8.0, 16.0]
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()
