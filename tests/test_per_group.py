"""With ``switch="per_group"`` every unit of groups has phases of its own, and what must always hold holds in each."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import images, labels, start, tiny_vit, train
from standing import FIELDS, PASSES, Standing
from test_controller_resume import assert_same
from timm.utils.model_ema import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from two_ranks import running

from prelora import CheckpointError, distributed, monitor, sharding, surgery
from prelora.nn import LoRALinear
from prelora.nn.deferred_grads import lora_grads_pending
from prelora.surgery import is_lora

SWITCHES = {
    "vit": {2: ("attn_out",), 3: ("q", "k", "v"), 5: ("mlp_in", "mlp_out")},
    "hf vit": {2: ("q", "v", "attn_out"), 3: ("k",), 5: ("mlp_in", "mlp_out")},
}
"""The groups that switch after each epoch: timm's q and v wait for the k of their Linear."""
LAST = 7
"""The epoch after which everything is frozen."""


@pytest.fixture
def standing(monkeypatch):
    norms = Standing()
    monkeypatch.setattr(monitor, "measure", norms)
    return norms


def begin(family="vit", fields=None, **options):
    return start(family, fields=FIELDS | (fields or {}), total_steps=604, **options)


def base_of(pre, groups):
    """The weights and biases of the groups' targets, by name."""
    paths = {target.path for target in pre.targets if target.group in groups}
    named = pre.base_model.named_parameters()
    return {name: p for name, p in named if name.rpartition(".")[0] in paths and not is_lora(name)}


@pytest.mark.parametrize("family", SWITCHES)
def test_each_unit_switches_when_its_own_norms_stand_still_and_freezes_w_epochs_later(family, standing):
    pre = begin(family)

    events = standing.epochs(pre, 8)

    switched, frozen = SWITCHES[family], {epoch + 2: groups for epoch, groups in SWITCHES[family].items()}
    assert {e.epoch: e.switched_groups for e in events if e.switched_groups} == switched
    assert {e.epoch: e.frozen_groups for e in events if e.frozen_groups} == frozen
    assert [e.action for e in events] == [
        "none",
        "switch",
        "switch",
        "freeze",
        "switch+freeze",
        "none",
        "freeze",
        "none",
    ]
    assert [e.phase for e in events] == ["full", *["warmup"] * 5, "lora", "lora"]
    tested = [set(e.norm_changes) for e in events]
    assert tested[:5] == [set(), set(PASSES), set(PASSES) - set(switched[2]), {"mlp_in", "mlp_out"}, tested[3]]
    assert tested[5:] == [set()] * 3


@pytest.mark.parametrize("family", SWITCHES)
def test_at_every_switch_ranks_frozen_weights_memory_and_optimizer_are_as_promised(family, standing):
    pre, frozen = begin(family), {}
    for _ in range(LAST + 1):
        (event,) = standing.epochs(pre, 1)
        model, phases = pre.base_model, pre.group_phases
        names = {target.name for target in pre.targets if phases[target.group] != "full"}
        assert surgery.realised_ranks(model, pre.targets) == pre.ranks == event.ranks
        assert set(pre.ranks) == names
        paths = {target.path for target in pre.targets if target.name in names}
        assert {path for path, module in model.named_modules() if isinstance(module, LoRALinear)} == paths
        assert all(torch.equal(parameter, before) for parameter, before in frozen.values())
        new = base_of(pre, event.frozen_groups)
        frozen |= {name: (parameter, parameter.detach().clone()) for name, parameter in new.items()}
        held = {parameter for group in pre.optimizer.param_groups for parameter in group["params"]}
        assert held == {parameter for name, parameter in model.named_parameters() if name not in frozen}
        assert all(parameter.requires_grad for parameter in held)
        assert not any(parameter.requires_grad for parameter, _ in frozen.values())
        elements = sum(parameter.numel() for parameter in new.values())
        # fp32 gradients; exp_avg, exp_avg_sq and step of each
        state = {"gradients": 4 * elements, "optimizer_state": 8 * elements + 4 * len(new)}
        assert event.released == (state if new else {})
    assert set(frozen) == set(base_of(pre, PASSES))


@pytest.mark.parametrize("family", SWITCHES)
def test_in_a_mixture_what_has_not_been_frozen_trains(family, standing):
    pre = begin(family)
    standing.epochs(pre, 4)
    before = {name: parameter.detach().clone() for name, parameter in pre.base_model.named_parameters()}
    train(pre)

    still = {name for name, parameter in pre.base_model.named_parameters() if torch.equal(parameter, before[name])}
    assert still == set(base_of(pre, SWITCHES[family][2]))
    assert set(pre.group_phases.values()) == {"full", "warmup", "lora"}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("vit", {"lora_init": "window_update"}),
        ("hf vit", {"warmup_epochs": 1, "freeze": "all"}),
        ("vit", {"warmup_epochs": 0, "train_lora_a": False}),
    ],
)
def test_a_run_resumed_in_any_mixture_is_the_uninterrupted_one_bit_for_bit(family, fields, standing):
    options = {
        "scheduler": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 30),
        "ema": lambda model: ModelEmaV3(model, decay=0.9),
    }
    pre, states, events = begin(family, fields, **options), [], []
    for epoch in range(LAST):
        states.append(copy.deepcopy(pre.state_dict()))
        events += standing.epochs(pre, 1)
        if epoch == 3:  # and inside an epoch
            inside = begin(family, fields, **options)
            inside.load_state_dict(copy.deepcopy(pre.state_dict()))
            train(inside, 1)
            once = begin(family, fields, **options)
            once.load_state_dict(copy.deepcopy(inside.state_dict()))
            assert_same(once.state_dict(), inside.state_dict())
    states.append(pre.state_dict())

    for done in range(1, LAST):
        resumed = begin(family, fields, **options)
        resumed.load_state_dict(copy.deepcopy(states[done]))
        assert_same(resumed.state_dict(), states[done])
        (event,) = standing.epochs(resumed, 1)
        assert dataclasses.asdict(event) == dataclasses.asdict(events[done])
        assert_same(resumed.state_dict(), states[done + 1])
    assert pre.phase == "lora"


def test_freezing_all_waits_for_the_last_group(standing):
    pre = begin(fields={"freeze": "all"})
    standing.epochs(pre, LAST - 1)
    assert pre.base_model.head.weight.requires_grad
    standing.epochs(pre, 1)

    assert {name for name, p in pre.base_model.named_parameters() if not p.requires_grad} == {
        name for name, _ in pre.base_model.named_parameters() if not is_lora(name)
    }


def test_lora_fa_freezes_a_with_its_own_base(standing):
    pre = begin(fields={"train_lora_a": False})
    standing.epochs(pre, 4)

    trains = {name for name, p in pre.base_model.named_parameters() if p.requires_grad and name.endswith("lora_A")}
    assert trains == {f"blocks.{i}.attn.qkv.lora_A" for i in range(3)}


@pytest.mark.parametrize(
    ("fields", "switches"),
    [
        ({"min_epoch": 4}, {4: ("q", "k", "v", "attn_out"), 5: ("mlp_in", "mlp_out")}),
        ({"deadline": 3}, {2: ("attn_out",), 3: ("q", "k", "v", "mlp_in", "mlp_out")}),
        ({"zeta": 1e-9, "deadline": 4}, {4: ("q", "k", "v", "attn_out", "mlp_in", "mlp_out")}),
    ],
)
def test_min_epoch_and_deadline_hold_for_each_group(fields, switches, standing):
    events = standing.epochs(begin(fields=fields), 5)

    assert {e.epoch: e.switched_groups for e in events if e.switched_groups} == switches


def test_each_injections_lora_is_ramped_from_its_own_switch(standing):
    pre, rates = begin(fields={"lora_lr_mult": 1.0}), []
    standing.epochs(pre, 2)
    handles = []
    for _ in range(4):
        hook = lambda optimizer, *_: rates.append({g["name"]: g["lr"] / 1e-3 for g in optimizer.param_groups})  # noqa: E731
        handles.append(pre.optimizer.register_step_pre_hook(hook))
        standing.epochs(pre, 1)
        handles.pop().remove()

    first, second = ([rate.get(name) for rate in rates] for name in ("group0/lora", "group0/lora2"))
    assert first == pytest.approx([i / 6 for i in range(1, 7)] + [1.0] * 2)
    assert second[:2] == [None, None]
    assert second[2:] == pytest.approx([i / 6 for i in range(1, 7)])
    assert {rate["group0"] for rate in rates} == {1.0}


@pytest.mark.parametrize("family", SWITCHES)
def test_deferred_gradients_are_backwards_own_in_a_mixture(family, standing):
    grads = {}
    for defer in (True, False):
        pre = begin(family, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), defer_lora_grads=defer)
        standing.epochs(pre, 4)
        for seed in (1, 2):
            output = pre.model(images(seed=seed))
            F.cross_entropy(output if isinstance(output, torch.Tensor) else output.logits, labels()).backward()
        layers = [module for module in pre.base_model.modules() if isinstance(module, LoRALinear)]
        assert {layer.defer_lora_grads for layer in layers} == ({True, False} if defer else {False})
        assert all(layer.defer_lora_grads == (defer and layer.weight.requires_grad) for layer in layers)
        assert lora_grads_pending(pre.base_model) is defer
        pre.finish_gradients()
        grads[defer] = {name: p.grad for name, p in pre.base_model.named_parameters() if p.requires_grad}

    for name, grad in grads[True].items():
        torch.testing.assert_close(grad, grads[False][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_state_from_before_there_were_units_loads(standing):
    fields = {"switch": "together", "tau": 1e6}
    for done in (1, 2, 4):
        pre, resumed = begin(fields=fields), begin(fields=fields)
        standing.epochs(pre, done)
        train(pre)
        old = copy.deepcopy(pre.state_dict())
        del old["config"]["switch"], old["switch_epochs"], old["freeze_epochs"]
        old["switch_epoch"] = pre.switch_epoch
        old["ramp"] = next(iter(old.pop("ramps").values()), {"start": 0, "length": 0})

        resumed.load_state_dict(old)

        assert_same(resumed.state_dict(), pre.state_dict())


def test_a_state_of_the_other_kind_of_switch_is_refused(standing):
    pre = begin()
    standing.epochs(pre, 3)

    with pytest.raises(CheckpointError, match="saved with switch = per_group, the config says together"):
        begin(fields={"switch": "together"}).load_state_dict(pre.state_dict())


def replicated(defer):
    """A run on this rank; what a hash of the parameters' bits is after each epoch, and what the events say."""
    monitor.measure, real = Standing(), monitor.measure
    try:
        pre = begin(wrap=DistributedDataParallel, defer_lora_grads=defer)
        found = []
        for _ in range(LAST + 1):
            (event,) = monitor.measure.epochs(pre, 1)
            names = {name for name, _ in pre.base_model.named_parameters() if is_lora(name)}
            unreduced = names & set(pre.model.parameters_to_ignore)
            left = {
                f"{path}.{part}"
                for path, module in pre.base_model.named_modules()
                if isinstance(module, LoRALinear) and module.weight.requires_grad
                for part in ("lora_A", "lora_B")
            }
            assert unreduced == (left if defer else set()), event.epoch
            found.append((distributed.fingerprint(pre.base_model), event.switched_groups, event.ranks))
        return found
    finally:
        monitor.measure = real


def in_shards(family):
    """A run whose model is made by ``family``: what switched, to which ranks, and the model of the end."""
    monitor.measure, real = Standing(), monitor.measure
    try:
        pre = begin(family, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01), defer_lora_grads=True)
        events = monitor.measure.epochs(pre, LAST + 1)
        model = {name: tensor.numpy() for name, tensor in pre.merged_state_dict().items()}
        return [(event.switched_groups, event.frozen_groups, event.ranks) for event in events], model
    finally:
        monitor.measure = real


def sharded_vit():
    return sharding.shard(tiny_vit(), torch.device("cpu"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.mark.parametrize("defer", [True, False])
def test_two_ranks_hold_the_same_bits_after_every_switch(defer, ranks):
    first, second = ranks(replicated, defer)

    assert first == second
    assert {epoch: groups for epoch, (_, groups, _) in enumerate(first, start=1) if groups} == SWITCHES["vit"]


def test_a_sharded_model_goes_through_every_switch_as_the_plain_one_does(ranks):
    (first, model), (second, _) = ranks(in_shards, sharded_vit)

    expected, plain = in_shards(tiny_vit)

    assert first == second == expected
    for name, values in plain.items():
        torch.testing.assert_close(*map(torch.from_numpy, (model[name], values)), rtol=1e-3, atol=1e-5, msg=name)
