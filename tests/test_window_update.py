"""The last window's change: its rank decides the switch, and LoRA starts along it without a change of the function."""

import math

import fsdp_runs
import pytest
import torch
from models import epochs, images, start, tiny_vit, until
from two_ranks import running

from prelora import PreLoRAWarning, find_targets, shards, surgery
from prelora.checkpoint import load_checkpoint
from prelora.monitor import take_snapshot
from prelora.sharded_checkpoint import save_together
from prelora.window_update import initial_a, update_ranks

BOTH = {"criterion": "update_rank", "update_rank_max": 64, "lora_init": "window_update"}


def rows(target, weight):
    return weight if target.rows is None else weight[slice(*target.rows)]


def moved(rank, dtype=torch.float64):
    """A model after a change of every target by a matrix of ``rank``; its targets, start and changes by name."""
    model = tiny_vit(depth=1).to(dtype)
    targets = find_targets(model)
    before = take_snapshot(model, targets)
    generator = torch.Generator().manual_seed(3)
    changes = {}
    with torch.no_grad():
        for target in targets:
            weight = rows(target, model.get_submodule(target.path).weight)
            left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in weight.shape)
            changes[target.name] = left @ right.t()
            weight += changes[target.name].to(dtype)
    return model, targets, before, changes


def slices_of(a, targets, ranks):
    """Each target's rows of its module's A."""
    found = {}
    for path in a:
        names = [target.name for target in targets if target.path == path]
        found |= dict(zip(names, a[path].split([ranks[name] for name in names]), strict=True))
    return found


def test_every_slices_stable_rank_is_float64s():
    model, targets, before, changes = moved(5)

    found = update_ranks(model, targets, before, seed=0, epoch=1)

    values = {name: torch.linalg.svdvals(change) for name, change in changes.items()}
    expected = {name: (s.square().sum() / s[0] ** 2).item() for name, s in values.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == [target.name for target in targets]


def test_a_target_that_did_not_move_has_no_rank():
    model, targets, before, _ = moved(2)
    before["blocks.0.attn.proj"] = model.blocks[0].attn.proj.weight.detach().clone()

    found = update_ranks(model, targets, before, seed=0, epoch=1)

    assert [name for name, rank in found.items() if math.isnan(rank)] == ["blocks.0.attn.proj"]


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_spans_the_leading_right_singular_space_of_each_slices_change(rank):
    model, targets, before, changes = moved(4)
    ranks = {target.name: rank for target in targets}

    a = slices_of(initial_a(model, targets, ranks, before, seed=0), targets, ranks)

    for name, change in changes.items():
        leading = torch.linalg.svd(change).Vh[:rank]
        own = torch.linalg.qr(a[name].t()).Q
        assert torch.allclose(own @ own.t(), leading.t() @ leading, atol=1e-6), name
        assert a[name].norm(dim=1).tolist() == pytest.approx([3**-0.5] * rank)  # √in · 1/√(3·in)


def test_a_change_of_lower_rank_is_filled_up_orthogonally_to_it():
    model, targets, before, changes = moved(2)
    ranks = {target.name: 6 for target in targets}

    a = slices_of(initial_a(model, targets, ranks, before, seed=0), targets, ranks)

    for name, change in changes.items():
        leading = torch.linalg.svd(change).Vh[:2]
        assert torch.allclose(a[name][2:] @ leading.t(), torch.zeros(4, 2).double(), atol=1e-9)
        assert torch.linalg.matrix_rank(a[name]) == 6
        assert a[name].norm(dim=1).tolist() == pytest.approx([3**-0.5] * 6)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_what_did_not_move_is_drawn_as_by_kaiming_with_a_warning(value):
    model, targets = tiny_vit(depth=1), find_targets(tiny_vit(depth=1))
    before = {path: weight + value for path, weight in take_snapshot(model, targets).items()}
    ranks = {target.name: 2 for target in targets}

    with pytest.warns(PreLoRAWarning, match=r"the weights of 6 of 6 targets, as blocks\.0\.attn\.qkv\[q\], did not"):
        a = initial_a(model, targets, ranks, before, seed=7)

    surgery.inject(model, targets, ranks, seed=7)
    for path, drawn in a.items():
        assert torch.equal(drawn, model.get_submodule(path).lora_A)


def test_no_global_random_state_moves():
    model, targets, before, _ = moved(2)
    state = torch.get_rng_state()

    update_ranks(model, targets, before, seed=0, epoch=1)
    initial_a(model, targets, {target.name: 4 for target in targets}, before, seed=0)

    assert torch.equal(torch.get_rng_state(), state)


# In a run.


def test_it_switches_at_the_first_test_that_passes_and_measures_each_window():
    pre = start(fields={**BOTH, "k": 2, "m": 2})
    events = epochs(pre, 4)

    assert [event.action for event in events] == ["none", "none", "none", "switch"]
    assert [len(event.update_ranks) for event in events] == [0, 18, 0, 18]
    assert events[-1].reason == "every update is within update_rank_max, and the loss within zeta"


def test_a_rank_that_is_too_high_holds_back_and_names_its_group():
    pre = start(fields={**BOTH, "update_rank_max": 1})
    event = epochs(pre, 3)[-1]

    queries = [rank for name, rank in event.update_ranks.items() if name.endswith("[q]")]
    assert event.phase == "full"
    assert event.reason == (
        f"update of q in window 2 of 2 has stable rank {sum(queries) / 3:.3f}: over update_rank_max = 1"
    )


@pytest.mark.parametrize(
    ("fields", "window"), [({}, 1), ({"m": 3, "tau": 1e-9, "criterion": "norm", "deadline": 2}, 0)]
)
def test_lora_starts_along_the_change_since_the_last_windows_end_or_monitorings_start(fields, window):
    pre = start(fields={**BOTH, **fields})
    epochs(pre, window)
    before = {path: weight.clone() for path, weight in take_snapshot(pre.base_model, pre.targets).items()}
    event = until(pre, "warmup")

    weights = take_snapshot(pre.base_model, pre.targets)  # B is zero still: the base's
    for target in pre.targets:
        layer = pre.base_model.get_submodule(target.path)
        change = rows(target, weights[target.path] - before[target.path]).double()
        place = [t.name for t in pre.targets if t.path == target.path].index(target.name)
        a = layer.lora_A.detach().double().split(layer.rank)[place]
        caught = (change @ torch.linalg.qr(a.t()).Q).square().sum().item()
        best = torch.linalg.svdvals(change)[: event.ranks[target.name]].square().sum().item()
        assert caught == pytest.approx(best, rel=1e-2)


def test_the_logits_are_the_same_bits_after_injection():
    pre, plain = (start(fields={**BOTH, "lora_init": init}) for init in ("window_update", "kaiming"))
    until(pre, "warmup")
    until(plain, "warmup")

    with torch.no_grad():
        assert torch.equal(pre.model.eval()(images()), plain.model.eval()(images()))
    assert not torch.equal(pre.model.blocks[0].mlp.fc1.lora_A, plain.model.blocks[0].mlp.fc1.lora_A)


def test_the_average_starts_from_the_same_a():
    from timm.utils.model_ema import ModelEmaV3

    pre = start(fields=BOTH, ema=lambda model: ModelEmaV3(model, decay=0.9))
    until(pre, "warmup")

    assert torch.equal(pre.ema.module.blocks[0].mlp.fc1.lora_A, pre.model.blocks[0].mlp.fc1.lora_A)


def test_the_copy_is_of_monitorings_start_and_windows_ends_and_goes_at_the_switch():
    pre = start(fields={**BOTH, "m": 2, "monitor_from": 1})
    kept = [pre.state_dict()["window_snapshot"]]
    weights = []
    for _ in range(5):
        epochs(pre, 1)
        kept.append(pre.state_dict()["window_snapshot"])
        weights.append(pre.model.blocks[0].mlp.fc1.weight.detach().clone())

    assert kept[0] is kept[5] is None
    for copy, of_epoch in zip(kept[1:5], (1, 1, 3, 3), strict=True):
        assert torch.equal(copy["blocks.0.mlp.fc1"], weights[of_epoch - 1])


@pytest.mark.parametrize("fields", [{}, {"lora_init": "kaiming", "criterion": "norm"}])
def test_without_either_option_nothing_is_copied_or_measured(fields):
    pre = start(fields=fields)

    assert [event.update_ranks for event in epochs(pre, 2)] == [{}, {}]
    assert start(fields=fields).state_dict()["window_snapshot"] is None


# On two ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with running(tmp_path_factory.mktemp("ranks")) as started:
        yield started


def switched(wrap):
    """Update ranks of the two windows, every A, and AᵀA, which no sign changes."""
    pre = fsdp_runs.start(wrap, fields=BOTH)
    events = [fsdp_runs.end(pre, fsdp_runs.train(pre)[0]) for _ in range(2)]
    gram = {name: (value.t() @ value).flatten().tolist() for name, value in every_a(pre).items()}
    return [event.update_ranks for event in events], plain_numbers(every_a(pre)), gram


def interrupted(wrap, path):
    """Update ranks of the switch and every A, of a run saved inside a window and of the one that goes on from there."""
    runs = [fsdp_runs.start(wrap, fields={**BOTH, "m": 2}) for _ in range(2)]
    for _ in range(3):
        fsdp_runs.end(runs[0], fsdp_runs.train(runs[0])[0])
    save_together(path, runs[0].state_dict(), {})
    runs[1].load_state_dict(load_checkpoint(path))
    return [(fsdp_runs.end(run, fsdp_runs.train(run)[0]).update_ranks, plain_numbers(every_a(run))) for run in runs]


def every_a(pre):
    assert pre.phase == "warmup"
    return {name: shards.full(p) for name, p in pre.base_model.named_parameters() if name.endswith("lora_A")}


def plain_numbers(tensors):
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("wrap", [fsdp_runs.ddp, fsdp_runs.fsdp])
def test_two_ranks_measure_and_start_from_the_same_as_one_process_does(wrap, ranks):
    measured, _, grams = switched(fsdp_runs.plain)

    first, second = ranks(switched, wrap)

    assert first[:2] == second[:2]
    for found, expected in zip(first[0], measured, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for name, gram in grams.items():
        assert first[2][name] == pytest.approx(gram, abs=1e-4), name


def test_a_sharded_run_resumed_inside_a_window_starts_from_the_same_a(ranks, tmp_path):
    for uninterrupted, resumed in ranks(interrupted, fsdp_runs.fsdp, tmp_path / "step-000000001"):
        assert resumed == uninterrupted
