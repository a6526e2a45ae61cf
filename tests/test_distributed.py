"""Two gloo ranks stay one run: the same decisions, the same plan and the same bits, through all phases."""

import contextlib
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from models import tiny_vit
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from two_ranks import WORLD, bits, running

from prelora import PreLoRA, PreLoRAConfig, distributed, monitor, surgery
from prelora.targets import find_targets

EPOCHS, STEPS, ACCUMULATE, BATCH, FREEZE = 5, 2, 2, 4, 4
CONFIG = PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, warmup_epochs=2, r_min=1, r_max=4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks")) as started:
        yield started


# What runs on a rank.


def vit():
    return tiny_vit(depth=2, embed_dim=32).double()


def own_all_reduce(model):
    """No wrapper at all: the loop averages the gradients itself."""
    return model


def compiled_in_ddp(model):
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"))


def ddp_in_compiled(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


WRAPPERS = {
    own_all_reduce: [],
    DistributedDataParallel: ["DistributedDataParallel"],
    compiled_in_ddp: ["DistributedDataParallel", "OptimizedModule"],
    ddp_in_compiled: ["OptimizedModule", "DistributedDataParallel"],
}


def start(wrap=own_all_reduce, config=CONFIG, **options):
    model = vit()
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    return PreLoRA(wrap(model), optimizer, config, ema=ema, total_steps=EPOCHS * STEPS, **options)


def global_batch(epoch, step, micro):
    seed = torch.Generator().manual_seed(1000 * epoch + 10 * step + micro)
    images = torch.randn(WORLD * BATCH, 3, 32, 32, generator=seed, dtype=torch.float64)
    return images, torch.randint(10, [WORLD * BATCH], generator=seed)


def train_epoch(pre):
    """Steps of accumulated micro-batches, each rank on its part of the global batch; returns the mean loss."""
    here, world = distributed.rank(), distributed.world_size()
    losses = []
    for step in range(STEPS):
        for micro in range(ACCUMULATE):
            images, labels = (part.chunk(world)[here] for part in global_batch(pre.epoch, step, micro))
            quiet = micro < ACCUMULATE - 1 and isinstance(pre.model, DistributedDataParallel)
            with pre.model.no_sync() if quiet else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(pre.model(images), labels)
                (loss / ACCUMULATE).backward()
            losses.append(loss.item())
        if world > 1 and pre.model is pre.base_model:
            for parameter in pre.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world
        pre.optimizer.step()
        pre.optimizer.zero_grad()
        pre.ema.update(pre.base_model)
    return sum(losses) / len(losses)


def wrappers_of(model):
    """What is around the plain model, from outside in."""
    inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, DistributedDataParallel) else None)
    return [] if inner is None else [type(model).__name__, *wrappers_of(inner)]


def run(wrap, defer_lora_grads=False):
    """A whole run; its state after each epoch, and the events, both as the ranks see them."""
    torch.manual_seed(distributed.rank())  # a run must not lean on equal global random states
    pre = start(wrap, defer_lora_grads=defer_lora_grads)
    states, events, wrappers = [], [], [wrappers_of(pre.model)]
    for _ in range(EPOCHS):
        event = pre.end_epoch(train_epoch(pre), probe=global_batch(0, 0, 0)[0])
        state = pre.state_dict()
        states.append({key: bits(state[key]) for key in ("model", "optimizer", "ema")})
        events.append(event)
        wrappers.append(wrappers_of(pre.model))
    parameters = {name: tensor.detach().clone() for name, tensor in pre.base_model.state_dict().items()}
    return {"states": states, "events": events, "parameters": parameters, "wrap": wrap, "wrappers": wrappers}


WAYS = {f"{wrap.__name__}{', deferred' * defer}": (wrap, defer) for wrap in WRAPPERS for defer in (False, True)}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def both(ranks, request):
    """The run on two ranks, wrapped in each way, with gradient accumulation and EMA."""
    return ranks(run, *request.param)


# Invariant 4: after the switch and after the freeze all ranks hold the same bits.


@pytest.mark.parametrize("part", ["model", "optimizer", "ema"])
def test_after_every_epoch_both_ranks_hold_the_same_bits(part, both):
    first, second = ([state[part] for state in result["states"]] for result in both)

    assert len(first) == EPOCHS
    assert first == second


def test_both_ranks_switch_and_freeze_together_with_the_same_plan(both):
    first, second = ([(event.action, event.ranks) for event in result["events"]] for result in both)

    assert [action for action, _ in first] == ["none", "switch", "none", "freeze", "none"]
    assert first == second


def test_both_ranks_report_the_same_numbers(both):
    first, second = (result["events"] for result in both)

    assert first == second


def test_frozen_weights_stay_as_they_were_at_the_freeze_on_both_ranks(both):
    frozen = [f"{target.path}.{part}" for target in find_targets(vit()) for part in ("weight", "bias")]

    for result in both:
        at_freeze, at_end = (result["states"][epoch - 1]["model"] for epoch in (FREEZE, EPOCHS))
        assert {name: at_end[name] for name in frozen} == {name: at_freeze[name] for name in frozen}
        assert at_end["blocks.0.mlp.fc1.lora_B"] != at_freeze["blocks.0.mlp.fc1.lora_B"]


def test_in_every_phase_the_model_is_in_the_wrappers_that_it_came_in(both):
    for result in both:
        assert result["wrappers"] == [WRAPPERS[result["wrap"]]] * (EPOCHS + 1)


@pytest.fixture(scope="module")
def alone():
    return run(own_all_reduce)


def test_two_ranks_do_what_one_does_on_the_same_global_batch(both, alone):
    found, expected = both[0]["parameters"], alone["parameters"]

    assert both[0]["events"][-1].ranks == alone["events"][-1].ranks
    assert list(found) == list(expected)
    for name in expected:
        # fp64, so that what remains is Adam's division by small second moments
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9, msg=name)


# Rank 0 decides, on the mean over ranks.


def decide(losses):
    """Events' actions where the weights stand still and each rank's losses are these."""
    pre = start(config=PreLoRAConfig(k=2, m=1, tau=1.0, zeta=1.0, r_min=1, r_max=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer changed more than another: the middle rank, and a warning
        events = [pre.end_epoch(loss) for loss in losses[distributed.rank()]]
    return [event.action for event in events], [event.loss for event in events], pre.ranks


LOSSES = {
    "flat on both": (([1.0, 1.0], [1.0, 1.0]), "switch"),
    "flat in the mean": (([1.0, 2.0], [2.0, 1.0]), "switch"),
    "jumps on 1": (([1.0, 1.0], [1.0, 5.0]), "none"),
    "jumps on 0": (([1.0, 5.0], [1.0, 1.0]), "none"),
    "NaN on 0": (([1.0, math.nan], [1.0, 1.0]), "none"),
    "NaN on 1": (([1.0, 1.0], [1.0, math.nan]), "none"),
}


@pytest.mark.parametrize(("losses", "action"), LOSSES.values(), ids=LOSSES)
def test_the_decision_is_made_on_the_mean_loss_and_is_the_same_everywhere(losses, action, ranks):
    first, second = ranks(decide, losses)

    assert first[0] == second[0] == ["none", action]
    assert first[2] == second[2]


def see_wrongly():
    """Rank 1 measures nonsense; what it is told."""
    measure = monitor.measure
    if distributed.rank() == 1:
        wrong = dict.fromkeys([target.name for target in find_targets(vit())], math.nan)
        monitor.measure = lambda *_: monitor.Norms(wrong, wrong, {}, {})
    try:
        pre = start(config=PreLoRAConfig(k=2, m=1, tau=100.0, zeta=100.0, r_min=1, r_max=4))
        events = [pre.end_epoch(train_epoch(pre)) for _ in range(2)]
    finally:
        monitor.measure = measure
    return events


def test_norms_decision_and_plan_are_those_of_rank_0(ranks):
    first, second = ranks(see_wrongly)

    assert first[-1].action == "switch"
    assert first == second


# Divergence is found, and named.


def diverge(change):
    """What a check says on each rank after rank 1 changed a parameter, and what the switch says."""
    said = []
    for check in (lambda pre: distributed.check_same_on_all_ranks(pre.base_model), lambda pre: pre.end_epoch(1.0)):
        pre = start(DistributedDataParallel, PreLoRAConfig(k=2, m=1, deadline=2, tau=1e-9, zeta=1e6))
        pre.end_epoch(1.0)
        if distributed.rank() == 1:
            with torch.no_grad():
                change(pre.base_model)
        try:
            check(pre)
        except RuntimeError as error:
            said.append(str(error))
    return said


def one_bit(model):
    model.blocks[1].mlp.fc1.weight.view(torch.int64)[3, 4] ^= 1


def a_swap(model):
    rows = model.blocks[1].mlp.fc1.weight
    rows.copy_(rows.flip(0))


def sign_of_zero(model):
    model.blocks[1].mlp.fc1.bias.neg_()


def another_parameter(model):
    model.blocks[1].mlp.register_parameter("extra", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    ("change", "name"),
    [(one_bit, "fc1.weight"), (a_swap, "fc1.weight"), (sign_of_zero, "fc1.bias"), (another_parameter, "extra")],
)
def test_a_planted_difference_is_named_by_the_check_and_by_the_switch_on_both_ranks(change, name, ranks):
    expected = f"rank 1 and rank 0 differ in 1 parameters, as ['blocks.1.mlp.{name}']"

    for said in ranks(diverge, change):
        assert [expected in text for text in said] == [True, True]


def with_own_buffers():
    model = vit()
    model.register_buffer("seen", torch.tensor(float(distributed.rank())))
    distributed.check_same_on_all_ranks(model)
    return model.seen.item()


def test_buffers_may_be_each_ranks_own(ranks):
    assert ranks(with_own_buffers) == [0.0, 1.0]


# The wrapper is built anew as it was; the old one refuses to work.


def call_stale(wrap):
    pre = start(wrap)
    stale = pre.model
    pre.end_epoch(train_epoch(pre))
    pre.end_epoch(train_epoch(pre))
    try:
        stale(global_batch(0, 0, 0)[0])
    except Exception as error:  # noqa: BLE001 (compiled code wraps it in errors of its own)
        return str(error)
    return "it works"


@pytest.mark.parametrize("wrap", [DistributedDataParallel, compiled_in_ddp, ddp_in_compiled], ids=lambda w: w.__name__)
def test_a_wrapper_from_before_the_switch_raises_when_called(wrap, ranks):
    for said in ranks(call_stale, wrap):
        assert "was replaced at the switch: use pre.model from now on" in said


ATTRIBUTES = [
    "find_unused_parameters", "gradient_as_bucket_view", "static_graph", "broadcast_buffers", "bucket_bytes_cap",
    "bucket_bytes_cap_default", "dim", "device_ids", "training",
]  # fmt: skip


def rewrap_with(options):
    model = DistributedDataParallel(vit(), process_group=dist.new_group(), **options).eval()
    model.module.blocks.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = distributed.rewrap(model)
    modes = [module.training for module in again.module.modules()]
    return {
        "before": [getattr(model, name) for name in ATTRIBUTES],
        "after": [getattr(again, name) for name in ATTRIBUTES],
        "same group": again.process_group is model.process_group,
        "same model": again.module is model.module,
        "same modes": modes == [name.startswith("blocks") for name, _ in again.module.named_modules()],
        "anew": again is not model,
    }


SWITCHES = [{name: True} for name in ("find_unused_parameters", "gradient_as_bucket_view", "static_graph")]


@pytest.mark.parametrize(
    "options", [{}, *SWITCHES, {"broadcast_buffers": False}, {"bucket_cap_mb": 3}, {"bucket_cap_mb": 0.5}], ids=str
)
def test_a_ddp_wrapper_keeps_its_options(options, ranks):
    for found in ranks(rewrap_with, options):
        assert found["before"] == found["after"]
        assert found == {**found, "same group": True, "same model": True, "same modes": True, "anew": True}


def counting_hook(calls, bucket):
    calls.append(bucket.index())
    return dist.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future().then(lambda done: done.value()[0])


def count_hook_calls():
    calls = []

    def wrap(model):
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(calls, counting_hook)
        return ddp

    pre, counts = start(wrap), []
    for _ in range(EPOCHS):
        loss = train_epoch(pre)
        counts.append(len(calls))
        calls.clear()
        pre.end_epoch(loss)
    return counts, bits(dict(pre.base_model.state_dict()))


def test_a_communication_hook_is_carried_along_with_its_state(ranks):
    first, second = ranks(count_hook_calls)

    assert min(first[0]) >= STEPS  # called at every step of every phase
    assert first == second


def released(options):
    pre = start(lambda model: DistributedDataParallel(model, **options))
    events = [pre.end_epoch(train_epoch(pre)) for _ in range(FREEZE)]
    return events[-1].released


@pytest.mark.parametrize("view", [False, True])
def test_released_counts_ddps_copy_of_the_gradients_where_there_is_one(view, ranks):
    model = vit()
    targets = {target.path for target in find_targets(model)}
    frozen = sum(8 * p.numel() for name, p in model.named_parameters() if name.rpartition(".")[0] in targets)

    for found in ranks(released, {"gradient_as_bucket_view": view}):
        assert found["gradients"] == frozen
        assert found.get("ddp_buckets") == (None if view else frozen)


# What cannot be taken through a switch is refused with the reason.


def fsdp1(model):
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its constructor wants a GPU
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


def ddp_mixed_precision(model):
    ddp = DistributedDataParallel(model)
    ddp.mixed_precision = object()  # its constructor wants one as well
    return ddp


def refusal(wrap):
    model = vit()
    wrapped = wrap(model)
    try:
        PreLoRA(wrapped, torch.optim.AdamW(model.parameters()), CONFIG)
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (nn.DataParallel, "DataParallel is not supported: wrap the model in DistributedDataParallel"),
        (fsdp1, "FullyShardedDataParallel is not supported: wrap the model in DistributedDataParallel"),
        (ddp_mixed_precision, "mixed_precision=...) hooks itself into the model: use autocast"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_wrapper_is_refused_with_the_reason(wrap, reason, ranks):
    for said in ranks(refusal, wrap):
        assert reason in said


# The collectives.

VALUES = ["", "ü" * 1000, [], {"a": [1, 2.5, None, True]}, 0.1, 2**60, math.inf]


def exchange(mine):
    value = mine[distributed.rank()]
    return distributed.broadcast_json(value), distributed.gather_json(value)


@pytest.mark.parametrize("one", VALUES, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("other", ["short", ["long"] * 999], ids=["short", "long"])
def test_json_travels_whatever_the_sizes_on_the_other_ranks(one, other, ranks):
    assert ranks(exchange, (one, other)) == [(one, [one, other])] * WORLD
    assert ranks(exchange, (other, one)) == [(other, [other, one])] * WORLD


def mean(values):
    return distributed.mean_over_ranks(values[distributed.rank()])


def test_the_mean_over_ranks_is_in_double_precision_and_the_same_on_each(ranks):
    assert ranks(mean, (0.1, 1e-9)) == [(0.1 + 1e-9) / 2] * WORLD


def test_without_a_process_group_a_rank_is_alone():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.broadcast_json({"a": (1, 2)}) == {"a": [1, 2]}
    assert distributed.gather_json("x") == ["x"]
    assert distributed.mean_over_ranks(3) == 3.0
    distributed.check_same_on_all_ranks(vit())


# Control: why the wrapper must be taken off at all.


def inject_into_wrapped_ddp():
    model = vit()
    ddp = DistributedDataParallel(model)
    targets = find_targets(model)
    surgery.inject(model, targets, {target.name: 2 for target in targets})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = (part.chunk(WORLD)[distributed.rank()] for part in global_batch(0, 0, 0))
    nn.functional.cross_entropy(ddp(images), labels).backward()
    optimizer.step()
    try:
        distributed.check_same_on_all_ranks(model)
    except RuntimeError as error:
        return str(error)
    return "the same"


def test_lora_injected_into_a_wrapped_ddp_diverges(ranks):
    for said in ranks(inject_into_wrapped_ddp):
        assert "lora_B" in said
