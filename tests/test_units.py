"""Which groups switch as one, and when: each unit by its own norms, all of them on one loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelora.config import PreLoRAConfig
from prelora.monitor import Monitor
from prelora.targets import Target
from prelora.units import Clocks, decide, find_units, history


def fused(layers=2):
    """q, k and v as row slices of one module, and two groups of their own modules."""
    slices = {"q": (0, 4), "k": (4, 8), "v": (8, 12)}
    return [
        *(Target(f"{i}.qkv", group, i, rows) for group, rows in slices.items() for i in range(layers)),
        *(Target(f"{i}.{group}", group, i) for group in ("attn_out", "mlp_in") for i in range(layers)),
    ]


def separate(layers=2):
    return [Target(f"{i}.{group}", group, i) for group in ("q", "k", "v", "mlp_in") for i in range(layers)]


@pytest.mark.parametrize(
    ("targets", "units"),
    [
        (fused(), (("q", "k", "v"), ("attn_out",), ("mlp_in",))),
        (separate(), (("q",), ("k",), ("v",), ("mlp_in",))),
        ([Target("a", "x", 0, (0, 2)), Target("a", "y", 0, (2, 4)), Target("b", "y", 1, (0, 2)),
          Target("b", "z", 0, (2, 4)), Target("c", "w", 0)], (("x", "y", "z"), ("w",))),
    ],
)  # fmt: skip
def test_groups_that_share_a_module_are_one_unit(targets, units):
    assert find_units(targets, "per_group") == units
    assert find_units(targets, "together") == (tuple(group for unit in units for group in unit),)


def clocked(units, config, losses, norms):
    """The epoch at which each group of ``units`` switches, as the monitor sees ``norms[epoch][target]``."""
    clocks, monitor = Clocks(units), Monitor(fused(), config)
    for epoch, (loss, values) in enumerate(zip(losses, norms, strict=True), start=1):
        monitor.record(loss, values)
        clocks.mark(epoch, decide(clocks, monitor, epoch)[1], [])
    return clocks.switch_epochs


NAMES = [target.name for target in fused()]


@st.composite
def runs(draw):
    epochs = draw(st.integers(2, 9))
    value = st.sampled_from([1.0, 1.005, 1.02, 1.1])
    norms = [{name: draw(value) for name in NAMES} for _ in range(epochs)]
    return [draw(value) for _ in range(epochs)], norms


@given(
    runs(),
    st.sampled_from([{}, {"m": 2}, {"k": 3}, {"min_epoch": 4}, {"deadline": 5}, {"aggregate": "mean_abs"}]),
    st.sampled_from([0.6, 3.0]),
)
def test_a_unit_switches_exactly_when_a_run_of_that_unit_alone_would(run, fields, tau):
    config = PreLoRAConfig(**{"k": 2, "m": 1, "tau": tau, "zeta": 3.0} | fields)
    units = find_units(fused(), "per_group")

    found = clocked(units, config, *run)

    alone = [clocked([unit], config, *run) for unit in units]
    assert found == {group: epoch for one in alone for group, epoch in one.items()}
    for unit in units:
        assert len({found.get(group) for group in unit}) == 1


@given(runs(), st.sampled_from([0.6, 3.0]))
def test_together_is_never_before_the_last_unit(run, tau):
    config = PreLoRAConfig(k=2, m=1, tau=tau, zeta=3.0)

    together = clocked(find_units(fused(), "together"), config, *run)
    apart = clocked(find_units(fused(), "per_group"), config, *run)

    assert all(apart[group] <= epoch for group, epoch in together.items())


def test_the_reason_names_the_groups_that_it_is_about():
    config = PreLoRAConfig(k=2, m=1, tau=1.0, zeta=1.0, warmup_epochs=1)
    clocks, monitor = Clocks(find_units(fused(), "per_group")), Monitor(fused(), config)
    for norm in (1.0, 1.1):
        monitor.record(2.0, {name: norm if "mlp_in" in name else 1.0 for name in NAMES})
    clocks.mark(1, ["attn_out"], [])

    verdict, switching = decide(clocks, monitor, 2)

    assert switching == ["q", "k", "v"]
    assert verdict.reason == (
        "q, k, v: every change is within tau and zeta; attn_out: warm-up epoch 1 of 1; "
        "mlp_in: norm of mlp_in changed by +10.000 % between windows 1 and 2 of 2: over tau = 1.0 %"
    )
    assert set(verdict.norm_changes) == {"q", "k", "v", "mlp_in"}
    assert verdict.loss_changes == (0.0,)
    assert clocks.due(2, 1) == ["attn_out"]


def test_a_runs_phase_is_that_of_all_groups_or_warmup():
    clocks, seen = Clocks([("q", "k"), ("v",)]), []
    for epoch, switching, freezing in [(1, [], []), (2, ["v"], []), (3, [], ["v"]), (4, ["q", "k"], ["q", "k"])]:
        clocks.mark(epoch, switching, freezing)
        seen.append((clocks.phase, tuple(clocks.phases.values())))

    assert seen == [
        ("full", ("full", "full", "full")),
        ("warmup", ("full", "full", "warmup")),
        ("warmup", ("full", "full", "lora")),
        ("lora", ("lora", "lora", "lora")),
    ]
    assert list(history(clocks.switch_epochs, clocks.freeze_epochs)) == [
        (2, ["v"], []),
        (3, [], ["v"]),
        (4, ["q", "k"], ["q", "k"]),
    ]
