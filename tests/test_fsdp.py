"""FSDP2 goes through switch and freeze: what one process computes, on four ranks that hold a part each."""

import dataclasses

import pytest
import torch
from fsdp_runs import (
    EPOCHS,
    PHASES,
    RANKS,
    compiled,
    ddp,
    end,
    fsdp,
    hybrid,
    mixed,
    one_unit,
    plain,
    start,
    train,
    vit,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from two_ranks import running

from prelora import PreLoRA, PreLoRAConfig, distributed, sharding, shards, surgery
from prelora.errors import OptimizerError
from prelora.nn import LoRALinear

WAYS = {
    "ddp": {"wrap": ddp},
    "fsdp": {"wrap": fsdp},
    "fsdp, deferred": {"wrap": fsdp, "defer_lora_grads": True},
    "hybrid, deferred": {"wrap": hybrid, "defer_lora_grads": True},
    "one unit, A frozen": {"wrap": one_unit, "fields": {"train_lora_a": False}},
    "fsdp, all frozen": {"wrap": fsdp, "fields": {"freeze": "all"}},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks"), RANKS) as started:
        yield started


def held(pre, of="optimizer"):
    """What this rank holds of the parameters, or of the optimizer's moments, by name."""
    if of == "model":
        return {name: shards.local(p).clone() for name, p in pre.base_model.state_dict().items()}
    moments = pre.state_dict()["optimizer"]["state"]
    return {f"{name}.{key}": shards.local(value).clone() for name, own in moments.items() for key, value in own.items()}


def same(before, after):
    return [name for name in before if name in after and not torch.equal(before[name], after[name])]


def run(options):
    """A whole run and everything that is asked of it below; small enough to be sent."""
    torch.manual_seed(distributed.rank())
    pre = start(**options)
    result = {"losses": [], "gradients": [], "events": [], "changed": [], "kept": [], "realised": []}
    units = sharding._units(pre.base_model) if sharding.is_sharded(pre.base_model) else []
    for _ in range(EPOCHS):
        losses, norms = train(pre)
        moments = held(pre)
        event = end(pre, losses)
        result["losses"].append(losses)
        result["gradients"].append(norms)
        result["events"].append(dataclasses.replace(event, released={}))
        result["changed"].append(same(moments, held(pre)))
        result["kept"].append(sorted(set(moments) & set(held(pre))))
        result["realised"].append(surgery.realised_ranks(pre.base_model, pre.targets))
        if event.action == "freeze":
            frozen = {n: p for n, p in held(pre, "model").items() if not pre.base_model.get_parameter(n).requires_grad}
    result["frozen"] = len(frozen)
    result["moved"] = same(frozen, held(pre, "model"))
    result["sharded alike"] = units == (sharding._units(pre.base_model) if units else [])
    result["merged"] = pre.merged_state_dict()
    result["average"] = pre.merged_state_dict(ema=True)
    return result


@pytest.fixture(scope="module")
def alone():
    """The same run in this process, by the fields of its config."""
    known = {}

    def of(way):
        fields = WAYS[way].get("fields", {})
        if str(fields) not in known:
            known[str(fields)] = run({"wrap": plain, "fields": fields})
        return known[str(fields)]

    return of


@pytest.fixture(scope="module", params=WAYS)
def both(request, ranks, alone):
    """A run on four ranks, as each saw it, and the same in one process."""
    return ranks(run, WAYS[request.param]), alone(request.param)


def close(value):
    return pytest.approx(value, rel=1e-8, abs=1e-11)


# The run.


def test_losses_and_gradient_norms_are_those_of_one_process_in_every_phase(both):
    found, expected = both
    assert [event.phase for event in expected["events"]] == PHASES
    for mine in found:
        for here, there in zip(
            mine["losses"] + mine["gradients"], expected["losses"] + expected["gradients"], strict=True
        ):
            assert here == close(there)


@pytest.mark.parametrize("kind", ["base", "effective", "lora", "update"])
def test_norms_are_those_of_one_process_and_the_same_bits_on_every_rank(both, kind):
    found, expected = both
    assert all(mine["events"] == found[0]["events"] for mine in found)
    for here, there in zip(found[0]["events"], expected["events"], strict=True):
        assert getattr(here.norms, kind) == close(getattr(there.norms, kind))


def test_realised_ranks_equal_the_plan_on_every_rank(both):
    found, expected = both
    for mine in found:
        assert mine["realised"] == [event.ranks for event in mine["events"]] == expected["realised"]
        assert len(set(mine["realised"][-1].values())) > 1


def test_moments_of_what_trains_on_are_carried_bit_for_bit(both):
    for mine in both[0]:
        assert mine["changed"] == [[]] * EPOCHS
        assert min(map(len, mine["kept"])) > 0


def test_a_frozen_weight_is_bit_identical_after_the_steps_that_follow(both):
    for mine in both[0]:
        assert mine["frozen"] >= 16
        assert mine["moved"] == []


@pytest.mark.parametrize("which", ["merged", "average"])
def test_the_merged_model_and_its_average_are_whole_on_every_rank_and_those_of_one_process(both, which):
    found, expected = both
    for mine in found:
        assert all(type(tensor) is torch.Tensor for tensor in mine[which].values())
        for name, tensor in mine[which].items():
            torch.testing.assert_close(tensor, expected[which][name], rtol=1e-6, atol=1e-8)


def test_the_model_is_sharded_after_the_switch_as_it_was_before(both):
    assert all(mine["sharded alike"] for mine in both[0])


# Around surgery.


def taken_apart():
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, mesh = vit(torch.float32), init_device_mesh("cpu", (RANKS,))
    fully_shard([model.blocks[0], model.blocks[1]], mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.set_requires_gradient_sync(False)
    model.set_modules_to_forward_prefetch([model.blocks[0]])
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    before, units = dict(model.named_parameters()), sharding._units(model)
    with sharding.taken_apart(model):
        inside = [type(p).__name__ for p in model.parameters()] + [type(module).__name__ for module in model.modules()]
        states = [key for module in model.modules() for key in vars(module) if "fsdp" in key]
        hooks = [
            getattr(hook, "__module__", "")
            for module in model.modules()
            for table in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_pre_hooks)
            for hook in table.values()
        ]
    again = all(parameter is before[name] for name, parameter in model.named_parameters())
    return (
        inside,
        states,
        hooks,
        again,
        [(unit.paths, unit.arguments) for unit in units],
        units == sharding._units(model),
    )


def test_taken_apart_a_model_is_plain_and_put_together_it_has_its_own_parameters_and_settings(ranks):
    for inside, states, hooks, again, units, alike in ranks(taken_apart):
        assert not [name for name in inside if "FSDP" in name or "DTensor" in name]
        assert not [*states, *filter(lambda module: "fsdp" in module, hooks)]
        assert again
        assert alike
        assert [paths for paths, _ in units] == [("",), ("blocks.0", "blocks.1")]
        assert [arguments["reshard_after_forward"] for _, arguments in units] == [None, True]


def losses_of(wrap, autocast=False):
    """Of a step in each phase and one on each side of the switches, in fp32."""
    pre = start(wrap, torch.float32, average=False)
    losses = []
    for _ in range(EPOCHS):
        found, _ = train(pre, 1, torch.float32, autocast)
        end(pre, found, torch.float32)
        losses += found
    return losses


@pytest.mark.parametrize(("wrap", "autocast"), [(fsdp, True), (mixed, False)])
def test_in_bf16_losses_are_those_of_ddp_under_autocast(wrap, autocast, ranks):
    expected = ranks.only(2, losses_of, ddp, True)[0]
    for found in ranks.only(2, losses_of, wrap, autocast):
        assert found == pytest.approx(expected, rel=0.03)


def test_blocks_compiled_before_they_are_sharded_go_through_every_phase(ranks):
    expected = ranks.only(2, losses_of, fsdp)[0]
    for found in ranks.only(2, losses_of, compiled):
        assert found == pytest.approx(expected, rel=1e-5)


# Nothing made of gathered weights is kept.


def layer(sharded, **trains):
    made = LoRALinear(12, 18, rank=(2, 3, 1), rows=(6, 6, 6), dtype=torch.float64, execution="merged")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.requires_grad_(trains.get(name, True))
    if sharded:
        made._is_fsdp_managed_module = True  # as fully_shard leaves it
    return made


TRAINING = [{}, {"weight": False, "bias": False}, {"weight": False, "bias": False, "lora_A": False}, {"lora_B": False}]


@pytest.mark.parametrize("trains", TRAINING, ids=str)
@pytest.mark.parametrize("need_x", [True, False])
def test_a_sharded_layers_gradients_are_those_of_one_that_keeps_its_weight(trains, need_x):
    found = []
    for sharded in (False, True):
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_(need_x)
        module = layer(sharded, **trains)
        y = module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", TRAINING, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_sharded_layer_saves_its_parameters_and_never_what_it_merged(trains, autocast):
    module, saved = layer(True, **trains).to(torch.float32), []
    x = torch.randn(5, 12, requires_grad=True)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        module(x)
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own and t.shape == module.weight.shape] == []
    assert any(tensor.data_ptr() == module.weight.data_ptr() for tensor in saved)


# What cannot go through the switch is refused with the reason.


def parts_only(model):
    for block in model.blocks:
        fully_shard(block, mesh=init_device_mesh("cpu", (RANKS,)))
    return model


def ignored_target(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), ignored_params={model.blocks[0].mlp.fc1.weight})


def by_columns(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if tuple(p.shape) == (30, 120) else None)


def offloaded(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), offload_policy=CPUOffloadPolicy(pin_memory=False))


def not_by_fsdp(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))
    return model


def refusal(wrap):
    model = wrap(vit())
    try:
        PreLoRA(model, torch.optim.AdamW(model.parameters()), PreLoRAConfig())
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (
            parts_only,
            "applied to parts of the model, but not to the model itself; accepted is fully_shard on the blocks",
        ),
        (ignored_target, "blocks.0.mlp.fc1.weight is one of fully_shard's ignored_params: a target must be sharded"),
        (by_columns, "shard_placement_fn of the model gave another dimension than 0"),
        (offloaded, "accepted is no offload_policy"),
        (not_by_fsdp, "parameter 'head.weight' is a DTensor, but not FSDP2's"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_way_of_sharding_is_refused_with_the_reason(wrap, reason, ranks):
    for said in ranks(refusal, wrap):
        assert reason in said


def early(what):
    """The optimizer, or the average, built before the model is sharded, and left so."""
    model = vit()
    optimizer = torch.optim.AdamW(model.parameters())
    ema = torch.optim.swa_utils.AveragedModel(model)
    fsdp(model)
    if what == "ema":
        optimizer = torch.optim.AdamW(model.parameters())
    try:
        PreLoRA(model, optimizer, PreLoRAConfig(), ema=ema)
    except (OptimizerError, ValueError) as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("what", "reason"),
    [("optimizer", "build it after fully_shard"), ("ema", "build ema, then apply fully_shard to both alike")],
)
def test_what_was_built_before_the_model_was_sharded_is_refused(what, reason, ranks):
    assert all(reason in said for said in ranks.only(2, early, what))


# Ranks of one mind.


def lossy(losses):
    """Each rank with a loss of its own."""
    pre = start(fsdp, average=False)
    return [pre.end_epoch(loss[distributed.rank()]) for loss in losses]


def test_ranks_fed_different_losses_decide_by_their_mean_alike(ranks):
    first, second = ranks.only(2, lossy, [(1.0, 3.0), (float("nan"), 2.0), (2.0, 2.0)])
    assert repr(first) == repr(second)
    assert [event.loss for event in first[::2]] == [2.0, 2.0]


def different_ranks(wrap):
    """Rank 1's model comes out with another rank than planned, and says so of itself."""
    pre = start(wrap, average=False)
    realised = surgery.realised_ranks
    if distributed.rank() == 1:
        surgery.realised_ranks = lambda *_: {name: rank * 2 for name, rank in realised(*_).items()}
    inject = surgery.inject
    surgery.inject = lambda *arguments, **options: _injected(inject, realised, arguments, options)
    try:
        for _ in range(2):
            end(pre, [1.0])
    except RuntimeError as error:
        return str(error)
    finally:
        surgery.realised_ranks, surgery.inject = realised, inject
    return "accepted"


def _injected(inject, realised, arguments, options):
    lying, surgery.realised_ranks = surgery.realised_ranks, realised
    added = inject(*arguments, **options)
    surgery.realised_ranks = lying
    return added


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_a_rank_whose_realised_ranks_differ_is_named(wrap, ranks):
    for said in ranks.only(2, different_ranks, wrap):
        assert said == "the realised ranks of rank 1 differ from those of rank 0"


def compressed():
    pre = start(ddp, torch.float32, average=False)
    distributed.compress_gradients(pre.model)
    hooks = []
    for _ in range(4):
        end(pre, train(pre, dtype=torch.float32)[0], torch.float32)
        hooks.append([hook.__name__ for hook, _ in pre.model._comm_hooks])
    return pre.phase, hooks


def test_compression_of_gradients_outlives_every_switch(ranks):
    assert ranks.only(2, compressed) == [("lora", [["bf16_compress_hook"]] * 4)] * 2


def test_a_sharded_layer_is_not_merged_in_place():
    with pytest.raises(RuntimeError, match="merged_state_dict"):
        layer(True).merge()


def test_compression_of_gradients_refuses_what_has_none():
    with pytest.raises(TypeError, match="accepted is a DistributedDataParallel"):
        distributed.compress_gradients(nn.Linear(2, 2))
