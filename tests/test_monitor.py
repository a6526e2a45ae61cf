"""Norms are what float64 says at the price of one copy, and the windows are Algorithm 1's on the whole history."""

import json
import math

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prelora import PreLoRAConfig, Target, find_targets, surgery
from prelora.convergence import layer_changes, partial_convergence_test
from prelora.monitor import Monitor, measure, take_snapshot

REL = 1e-6


def exact(tensor):
    return tensor.detach().double().square().sum().sqrt().item()


def rows(target, weight):
    return weight if target.rows is None else weight[target.rows[0] : target.rows[1]]


def weights(model, targets):
    """W, s·B·A and their sum of every target in float64, from the layer's parameters alone."""
    found = {}
    for target in targets:
        layer = model.get_submodule(target.path)
        base = layer.weight.detach().double()
        delta = torch.zeros_like(base)
        if hasattr(layer, "lora_A"):
            start, element, row = 0, 0, 0
            for n, r in zip(layer.rows, layer.rank, strict=True):
                a, b = layer.lora_A[start : start + r], layer.lora_B.flatten()[element : element + n * r].view(n, r)
                scaling = 1 if layer.alpha is None else layer.alpha / r
                delta[row : row + n] = scaling * b.detach().double() @ a.detach().double()
                start, element, row = start + r, element + n * r, row + n
        found[target.name] = [rows(target, part) for part in (base, delta, base + delta)]
    return found


def with_lora(model, targets, **options):
    surgery.inject(model, targets, {target.name: 1 + i % 4 for i, target in enumerate(targets)}, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_norms_are_float64s_slice_by_slice_without_biases(family):
    model = models.FAMILIES[family]()
    targets = find_targets(model)
    for target in targets:
        if (bias := model.get_submodule(target.path).bias) is not None:
            nn.init.constant_(bias, 100.0)

    norms = measure(model, targets)

    expected = {name: exact(base) for name, (base, _, _) in weights(model, targets).items()}
    assert norms.base == norms.effective == pytest.approx(expected, rel=REL)
    assert (norms.lora, norms.update) == ({}, {})
    assert list(norms.base) == [target.name for target in targets]


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_after_injection_base_lora_and_merged_have_norms_of_their_own(alpha):
    model = models.tiny_vit()
    targets = find_targets(model)
    with_lora(model, targets, alpha=alpha)

    norms = measure(model, targets)

    parts = weights(model, targets)
    assert norms.base == pytest.approx({name: exact(part[0]) for name, part in parts.items()}, rel=REL)
    assert norms.lora == pytest.approx({name: exact(part[1]) for name, part in parts.items()}, rel=REL)
    assert norms.effective == pytest.approx({name: exact(part[2]) for name, part in parts.items()}, rel=REL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_norms_are_accumulated_in_at_least_fp32(dtype):
    model = nn.Sequential(nn.Linear(600, 700, dtype=dtype))
    targets = find_targets(model, {"fc": "0"})

    norms = measure(model, targets)

    assert norms.base["0"] == pytest.approx(exact(model[0].weight), rel=1e-13 if dtype == torch.float64 else REL)


def test_a_matrix_of_vit_larges_size_has_an_accurate_norm():
    model = nn.Sequential(nn.Linear(1024, 4096))
    nn.init.normal_(model[0].weight, 0.01, 0.02)

    assert measure(model, [Target("0", "fc", 0)]).base["0"] == pytest.approx(exact(model[0].weight), rel=REL)


@pytest.mark.parametrize("lora", [False, True])
def test_the_update_norm_is_relative_to_the_effective_weight_now(lora):
    model = models.tiny_vit()
    targets = find_targets(model)
    if lora:
        with_lora(model, targets)
    before = weights(model, targets)
    snapshot = take_snapshot(model, targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.5) if "lora_B" in name else parameter.add_(0.01)

    norms = measure(model, targets, snapshot)

    after = weights(model, targets)
    expected = {name: exact(after[name][2] - before[name][2]) / exact(after[name][2]) for name in before}
    assert norms.update == pytest.approx(expected, rel=1e-5)


def test_a_snapshot_is_a_copy():
    model = models.tiny_vit()
    targets = find_targets(model)
    snapshot = take_snapshot(model, targets)
    expected = {path: tensor.clone() for path, tensor in snapshot.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert set(snapshot) == {target.path for target in targets}
    assert all(torch.equal(tensor, expected[path]) for path, tensor in snapshot.items())


def test_the_update_of_a_zero_weight_is_left_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    targets = find_targets(model, {"fc": "*"})
    snapshot = take_snapshot(model, targets)
    nn.init.zeros_(model[0].weight)

    assert measure(model, targets, snapshot).update == {"1": 0.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_given_as_it_is(value):
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.constant_(model[0].weight, value)

    assert measure(model, [Target("0", "fc", 0)]).base["0"] == pytest.approx(value, nan_ok=True)


class Copies(TorchDispatchMode):
    """Counts what brings numbers from the device to the host: on an accelerator each would wait for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return func(*args, **kwargs or {})


def test_measuring_takes_one_device_to_host_copy(monkeypatch):
    """``tolist`` does not dispatch, so it is counted by itself."""
    model = models.tiny_vit()
    targets = find_targets(model)
    with_lora(model, targets)
    snapshot, lists, original = take_snapshot(model, targets), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or original(tensor))

    with Copies() as copies:
        measure(model, targets, snapshot)

    # base, LoRA, effective and update of 18 targets
    assert (copies.count, lists) == (0, [torch.Size([4 * 18])])


def test_the_counter_of_copies_counts():
    with Copies() as copies:
        [float(value) for value in torch.ones(3)]
        bool(torch.ones(1).any())

    assert copies.count == 4


def config(**fields):
    return PreLoRAConfig(**{"k": 3, "m": 2, "tau": 5.0, "zeta": 5.0} | fields)


TARGETS = [Target("a", "q", 0), Target("b", "q", 1), Target("c", "fc", 0)]
GROUPS = {"q": ["a", "b"], "fc": ["c"]}
KINDS = [{}, {"window": "last"}, {"aggregate": "mean_abs"}]


def fill(monitor, epochs):
    for loss, norms in epochs:
        monitor.record(loss, dict(zip("abc", norms, strict=True)))


def history(epochs):
    named = [dict(zip("abc", norms, strict=True)) for _, norms in epochs]
    return {group: [[epoch[name] for name in names] for epoch in named] for group, names in GROUPS.items()}


value = st.one_of(st.floats(0.9, 1.1), st.sampled_from([1.0, 1.0, math.nan, math.inf, 0.0]))
epochs_lists = st.lists(st.tuples(value, st.tuples(value, value, value)), max_size=30)
settings_of_windows = st.fixed_dictionaries({"k": st.integers(2, 4), "m": st.integers(1, 4)})


@given(epochs_lists, settings_of_windows, st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_the_verdict_is_algorithm_1s_on_the_whole_history(epochs, windows, kind):
    monitor = Monitor(TARGETS, config(**windows, **kind))
    for count, epoch in enumerate(epochs, start=1):
        fill(monitor, [epoch])
        seen = epochs[:count]
        expected = partial_convergence_test(history(seen), [loss for loss, _ in seen], monitor.config)

        assert monitor.window_complete == (count % monitor.config.m == 0)
        # The reason counts complete windows up to k; a NaN is never equal, so the numbers are compared as written.
        assert repr(monitor.test()) == repr(expected)


@given(epochs_lists.filter(lambda epochs: len(epochs) >= 2), settings_of_windows, st.sampled_from(KINDS))
@settings(max_examples=150, deadline=None)
def test_the_changes_are_algorithm_2s_input_from_the_whole_history(epochs, windows, kind):
    monitor = Monitor(TARGETS, config(**windows, **kind))
    fill(monitor, epochs)

    expected = {
        group: dict(zip(GROUPS[group], layer_changes(layers, monitor.config), strict=True))
        for group, layers in history(epochs).items()
    }
    assert repr(monitor.changes()) == repr(expected)


@given(epochs_lists, st.integers(0, 30), settings_of_windows)
@settings(max_examples=80, deadline=None)
def test_through_json_it_goes_on_to_the_same_verdicts(epochs, cut, windows):
    monitor, resumed = (Monitor(TARGETS, config(**windows)) for _ in range(2))
    fill(monitor, epochs[:cut])
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for epoch in epochs[cut:]:
        fill(monitor, [epoch])
        fill(resumed, [epoch])

    assert repr(resumed.test()) == repr(monitor.test())
    assert repr(resumed.state_dict()) == repr(monitor.state_dict())
    assert resumed.window_complete == monitor.window_complete


def test_memory_is_bounded_however_long_it_runs():
    monitor = Monitor(TARGETS, config(k=3, m=2))
    sizes = []
    for _ in range(50):
        fill(monitor, [(1.0, (1.0, 1.0, 1.0))])
        sizes.append(len(monitor.norms))

    assert (monitor.epochs, len(monitor.losses)) == (50, sizes[-1])
    assert max(sizes) < (3 + 1) * 2


def test_its_state_is_not_what_it_goes_on_to_change():
    monitor = Monitor(TARGETS, config())
    fill(monitor, [(1.0, (1.0, 2.0, 3.0))])
    state = monitor.state_dict()
    before = json.dumps(state)
    fill(monitor, [(2.0, (1.0, 2.0, 3.0))])
    other = Monitor(TARGETS, config())
    other.load_state_dict(state)
    fill(other, [(2.0, (1.0, 2.0, 3.0))])

    assert json.dumps(state) == before


def test_a_new_monitor_has_completed_no_window():
    assert not Monitor(TARGETS, config(m=1)).window_complete


def test_a_target_without_a_norm_counts_as_undefined_and_does_not_pass():
    monitor = Monitor(TARGETS, config(k=2, m=1))
    for _ in range(2):
        monitor.record(1.0, {"a": 1.0, "b": 1.0})

    verdict = monitor.test()

    assert not verdict.passed
    assert verdict.reason.startswith("norm of fc: change between windows 1 and 2 of 2 is undefined")
