"""One optimizer goes through the switch: what survives goes on bit for bit, what is new starts fresh."""

import copy

import pytest
import timm.optim
import torch
from torch import nn
from torch.optim import lr_scheduler

from prelora import CheckpointError, OptimizerError, surgery
from prelora.optim import (
    check_rebuildable,
    load_named_state,
    named_state,
    parameter_names,
    rebuild_optimizer,
    state_bytes,
)
from prelora.targets import find_targets


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def groups(model):
    """Two named groups: the matrices, which decay, and the rest, which do not and have half the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": matrices, "name": "matrices", "weight_decay": 0.1, "lr": 0.02},
        {"params": vectors, "name": "vectors", "weight_decay": 0.0, "lr": 0.01},
    ]


def timm_optimizer(name, **options):
    return lambda groups: timm.optim.create_optimizer_v2(groups, name, lr=0.02, **options)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam amsgrad": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.9, centered=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, initial_accumulator_value=0.1),
    "NAdam": torch.optim.NAdam,
    "timm lion": timm_optimizer("lion"),
    "timm adamw": timm_optimizer("adamw"),
    "timm lamb": timm_optimizer("lamb", max_grad_norm=None),
    "timm adan": timm_optimizer("adan"),
}


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


def steps(model, optimizer, numbers):
    """One training step for each number, which decides the batch."""
    for number in numbers:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def inject(model):
    targets = find_targets(model, {"in": "a", "out": "b"})
    return surgery.inject(model, targets, {"a": 2, "b": 3}), targets


def switched(model, optimizer, lr_mult=1.0):
    """The switch and the freeze at once; returns the optimizer, the groups' parents, and the names that left."""
    added, targets = inject(model)
    dropped = surgery.freeze(model, targets)
    return *rebuild_optimizer(optimizer, model, added=added, dropped=dropped, lr_mult=lr_mult), dropped


def options(group):
    return {key: value for key, value in group.items() if key != "params"}


def plain(value):
    """What a JSON round trip makes of a nested state: tuples become lists; tensors are kept beside it, copied."""
    if isinstance(value, dict):
        return {key: plain(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(below) for below in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_same(left, right):
    """Nested states, bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert set(left) == set(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for below in zip(left, right, strict=True):
            assert_same(*below)
    else:
        assert left == right


def test_surviving_moments_and_step_counts_are_carried_bit_for_bit(build):
    model = net()
    optimizer = build(groups(model))
    optimizer.defaults["note"] = "an option that the constructor does not know"
    steps(model, optimizer, range(3))
    before = copy.deepcopy(named_state(optimizer, model))

    rebuilt, _, dropped = switched(model, optimizer)

    after = named_state(rebuilt, model)
    assert type(rebuilt) is type(optimizer)
    assert rebuilt.defaults == optimizer.defaults
    survivors = set(before["state"]) - set(dropped)
    assert_same({name: after["state"].get(name) for name in survivors}, {n: before["state"][n] for n in survivors})
    assert_same(options(after["groups"][1]), options(before["groups"][1]))
    assert after["groups"][1]["params"] == ["norm.weight", "norm.bias"]


def test_rebuilt_without_a_change_it_goes_on_as_if_never_rebuilt(build):
    untouched, model = net(), net()
    reference, optimizer = build(groups(untouched)), build(groups(model))
    steps(untouched, reference, range(6))
    steps(model, optimizer, range(3))
    optimizer, parents = rebuild_optimizer(optimizer, model)
    steps(model, optimizer, range(3, 6))

    assert parents == [0, 1]
    assert_same(dict(model.state_dict()), dict(untouched.state_dict()))
    assert_same(named_state(optimizer, model), named_state(reference, untouched))


def steps_by_hand(parameters, optimizer, numbers):
    """Steps on gradients that depend on the parameter's name and the step alone."""
    for number in numbers:
        for name, parameter in parameters.items():
            generator = torch.Generator().manual_seed(number + 100 * len(name) + ord(name[0]))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_lora_starts_fresh_without_weight_decay(build):
    model = net()
    optimizer = build(groups(model))
    steps(model, optimizer, range(3))
    optimizer, _, _ = switched(model, optimizer)
    lora = {name: p for name, p in model.named_parameters() if surgery.is_lora(name)}
    other = {name: nn.Parameter(p.detach().clone()) for name, p in lora.items()}
    fresh = build([{"params": list(other.values()), "weight_decay": 0.0, "lr": 0.02}])

    steps_by_hand(dict(model.named_parameters()) | lora, optimizer, range(3))
    steps_by_hand(other, fresh, range(3))

    assert len(lora) == 4
    assert_same({name: p.data for name, p in lora.items()}, {name: p.data for name, p in other.items()})


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
def test_lora_enters_a_group_beside_its_weights_with_its_options_and_a_multiple_of_its_rate(lr):
    model = net()
    parameters = groups(model)
    parameters[0] |= {"lr": lr, "betas": (0.8, 0.9), "lr_scale": 0.7}
    optimizer = torch.optim.AdamW(parameters)
    before = [options(group) for group in copy.deepcopy(optimizer.param_groups)]
    added, _ = inject(model)

    rebuilt, parents = rebuild_optimizer(optimizer, model, added=added, lr_mult=3.0)

    names = [group["name"] for group in rebuilt.param_groups]
    held = [set(group["params"]) for group in rebuilt.param_groups]
    assert (names, parents) == (["matrices", "matrices/lora", "vectors"], [0, 0, 1])
    assert held[1] == {p for name, p in model.named_parameters() if surgery.is_lora(name)}
    assert [options(rebuilt.param_groups[i]) for i in (0, 2)] == before
    expected = before[0] | {"name": "matrices/lora", "weight_decay": 0.0, "lr": 3.0 * lr}
    assert options(rebuilt.param_groups[1]) == expected
    assert rebuilt.param_groups[1]["lr"] is not rebuilt.param_groups[0]["lr"]


def test_groups_without_a_name_are_named_by_their_index():
    model = net()
    optimizer = torch.optim.SGD([{"params": [model.a.weight]}, {"params": [model.b.weight]}], lr=0.1)
    added, _ = inject(model)

    rebuilt, parents = rebuild_optimizer(optimizer, model, added=added)

    names = parameter_names(rebuilt, model)
    found = {group["name"]: [names[p] for p in group["params"]] for group in rebuilt.param_groups}
    assert found == {
        "group0": ["a.weight"],
        "group0/lora": ["a.lora_A", "a.lora_B"],
        "group1": ["b.weight"],
        "group1/lora": ["b.lora_A", "b.lora_B"],
    }
    assert parents == [0, 0, 1, 1]


def test_what_is_dropped_leaves_its_group_and_its_state(build):
    model = net()
    optimizer = build(groups(model))
    steps(model, optimizer, range(2))
    frozen = [model.a.weight, model.b.weight]

    rebuilt, parents, dropped = switched(model, optimizer)

    assert set(dropped) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert [group["name"] for group in rebuilt.param_groups] == ["matrices/lora", "vectors"]
    assert parents == [0, 1]
    assert not any(parameter in rebuilt.state for parameter in frozen)
    steps(model, rebuilt, range(2, 4))
    fresh = build([{"params": group["params"]} for group in rebuilt.param_groups])
    fresh.load_state_dict(rebuilt.state_dict())
    assert_same(named_state(fresh, model)["state"], named_state(rebuilt, model)["state"])


def test_named_parameters_are_taken():
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    check_rebuildable(optimizer)
    steps(model, optimizer, range(2))
    optimizer, _, _ = switched(model, optimizer)
    steps(model, optimizer, range(2, 3))

    assert [group["name"] for group in optimizer.param_groups] == ["group0", "group0/lora"]


def test_lora_without_a_group_is_refused_and_the_optimizer_left_alone():
    model = net()
    optimizer = torch.optim.AdamW([model.a.weight])
    added, _ = inject(model)

    with pytest.raises(OptimizerError, match=r"b\.lora_A would not train: the optimizer does not hold the weight"):
        rebuild_optimizer(optimizer, model, added=added)
    steps(model, optimizer, range(1))


@pytest.mark.parametrize("use", ["step", "zero_grad", "state_dict", "scheduler"])
def test_a_retired_optimizer_raises_when_used(use):
    model = net()
    optimizer = torch.optim.AdamW(groups(model))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    steps(model, optimizer, range(1))
    switched(model, optimizer)

    with pytest.raises(RuntimeError, match=r"replaced at the switch: use pre\.optimizer"):
        scheduler.step() if use == "scheduler" else getattr(optimizer, use)()


def test_step_hooks_and_their_handles_are_carried():
    model, calls = net(), []
    optimizer = torch.optim.SGD(model.parameters())
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]
    rebuilt, _, _ = switched(model, optimizer)
    rebuilt.step()
    for handle in handles:
        handle.remove()
    rebuilt.step()

    assert calls == ["before", "after"]


class Stateful(torch.optim.SGD):
    """SGD that keeps one more thing."""

    def __init__(self, params, keep=None, key=None):
        super().__init__(params)
        parameter = self.param_groups[0]["params"][0]
        if keep is not None:
            self.state[parameter if key is None else key] = keep


class Demanding(torch.optim.SGD):
    def __init__(self, params, schedule):
        super().__init__(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: "adamw", "str is not a torch.optim.Optimizer; accepted is any"),
        (torch.optim.LBFGS, "LBFGS keeps one flat history over all parameters; accepted is any"),
        (lambda p: Stateful(p, {"names": ["a"]}), "Stateful keeps list 'names' per parameter; accepted"),
        (
            lambda p: Stateful(p, {"step": 1}, "global"),
            "Stateful keeps state under 'global', not one of",
        ),
        (lambda p: Stateful(p, [1.0]), "Stateful keeps state under Parameter"),
        (lambda p: Demanding(p, None), "Demanding cannot be rebuilt from its defaults: .*'schedule'"),
        (lambda p: timm.optim.Lookahead(torch.optim.SGD(p)), "Lookahead cannot be rebuilt from its defaults"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_with_the_reason(make, message):
    with pytest.raises(OptimizerError, match=message):
        check_rebuildable(make(list(net().parameters())))


def test_checking_leaves_the_optimizer_as_it_is(build):
    model = net()
    optimizer = build(groups(model))
    steps(model, optimizer, range(2))
    before = copy.deepcopy(named_state(optimizer, model))
    check_rebuildable(optimizer)

    assert_same(named_state(optimizer, model), before)


def test_parameters_outside_the_model_have_names_too():
    model, outside = net(), [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": outside}])

    names = parameter_names(optimizer, model)

    assert [names[p] for p in (model.a.bias, *outside)] == ["a.bias", "extra.1.0", "extra.1.1"]


def test_state_bytes_count_state_tensors_by_parameter():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, range(1))

    # exp_avg and exp_avg_sq of 30 fp32 elements, and step.
    assert state_bytes(optimizer)[model.a.weight] == 2 * 30 * 4 + 4


def test_loaded_by_name_into_other_groups_it_goes_on_bit_for_bit(build):
    model, other = net(), net()
    optimizer = build(groups(model))
    steps(model, optimizer, range(3))
    saved = plain(named_state(optimizer, model))
    # Groups and parameters in another order, of other names and rates, and not fresh either.
    shuffled = [g | {"name": "other", "lr": 1.0, "params": g["params"][::-1]} for g in groups(other)[::-1]]
    loaded = build(shuffled)
    steps(other, loaded, range(7, 9))
    other.load_state_dict(model.state_dict())

    load_named_state(loaded, other, saved)
    assert [options(group) for group in loaded.param_groups[::-1]] == [options(g) for g in optimizer.param_groups]
    steps(model, optimizer, range(3, 6))
    steps(other, loaded, range(3, 6))

    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_loading_shares_nothing_with_what_was_saved(build):
    model = net()
    optimizer = build(groups(model))
    steps(model, optimizer, range(3))
    saved = named_state(optimizer, model)
    before = copy.deepcopy(saved)
    other = net()
    loaded = build(groups(other))

    load_named_state(loaded, other, saved)
    steps(other, loaded, range(3))

    assert_same(saved, before)


def test_what_has_no_state_in_the_checkpoint_has_none_after_loading():
    model = net()
    saved = named_state(torch.optim.AdamW(model.parameters()), model)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, range(1))

    load_named_state(optimizer, model, saved)

    assert not optimizer.state


def test_an_empty_group_is_no_obstacle():
    model, other = net(), net()
    optimizer = torch.optim.SGD([*groups(model), {"params": []}], momentum=0.9)
    steps(model, optimizer, range(2))
    loaded = torch.optim.SGD([{"params": []}, *groups(other)])

    load_named_state(loaded, other, plain(named_state(optimizer, model)))
    rebuilt, parents, _ = switched(other, loaded)

    assert loaded is not rebuilt
    assert parents == [1, 2]
    assert [group["momentum"] for group in rebuilt.param_groups] == [0.9, 0.9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.Adam(groups(model)), "the checkpoint's optimizer is AdamW, the one given is Adam"),
        (
            lambda model: torch.optim.AdamW([model.a.weight]),
            "holds 6 parameters, the one given 1; they differ in a",
        ),
        (lambda model: torch.optim.AdamW(model.parameters()), "groups a.weight with other parameters than this one"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_and_nothing_changed(make, message):
    model = net()
    saved = named_state(torch.optim.AdamW(groups(model), lr=0.5), model)
    optimizer = make(model)
    steps(model, optimizer, range(1))
    before = copy.deepcopy(named_state(optimizer, model))

    with pytest.raises(CheckpointError, match=message):
        load_named_state(optimizer, model, saved)
    assert_same(named_state(optimizer, model), before)
