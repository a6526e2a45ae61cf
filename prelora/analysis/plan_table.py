"""A plan as a table that is read in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prelora.analysis.footprint import ITEMS
from prelora.analysis.hardware import GIGA, GPUS
from prelora.analysis.planner import PhasePlan, Plan
from prelora.analysis.run_time import RunTime, Schedule
from prelora.units import PHASES

LABEL, CELL = 34, 14
ITEM_NAMES = {
    "buckets": "DDP's buckets beside gradients",
    "snapshot": "snapshot for update norms",
    "gathered": "gathered by FSDP",
    "w_eff": "W_eff, autocast's copies",
}


def describe_setup(name: str, plan: Plan) -> list[str]:
    """What is planned: the model of this name, its ranks and where it is trained."""
    setup, ranks = plan.setup, list(plan.ranks.values())
    rank = (
        f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}, mean {_mean(ranks):.1f}"
    )
    return [
        f"{name}: {plan.parameters / 1e6:.2f} M parameters, {len(ranks)} targets, {rank}",
        f"{setup.cluster.gpus} × {setup.gpu}, {setup.strategy}, {setup.precision}, {setup.optimizer}: "
        f"{setup.batch} images × {setup.accumulate} accumulated × {setup.cluster.gpus} = {plan.global_batch} a step",
        "",
    ]


def describe_phases(plan: Plan) -> list[str]:
    """Each phase's trainable parameters, FLOPs, memory and communication."""
    setup = plan.setup
    rows = [
        row("counted, nothing was run", [phase.upper() for phase in PHASES]),
        _phase_row(plan, "trainable, M", lambda phase: f"{phase.trainable / 1e6:.2f}"),
        _phase_row(plan, "  share of the base", lambda phase: f"{100 * phase.trainable / plan.parameters:.2f} %"),
        _phase_row(plan, "GFLOP an image", lambda phase: f"{phase.flops / GIGA:.1f}"),
        "",
        "memory of a GPU, GB",
        *(_item_row(plan, item) for item in ITEMS if any(plan.phases[name].memory[item] for name in PHASES)),
        _phase_row(plan, "  total", lambda phase: f"{sum(phase.memory.values()) / GIGA:.2f}"),
        _phase_row(plan, f"images that fit {GPUS[setup.gpu].memory / GIGA:.0f} GB*", lambda p: str(p.largest_batch)),
    ]
    if setup.cluster.gpus > 1:
        rows += [
            "",
            "network, a GPU's step",
            _phase_row(plan, "  gradients reduced, GB", lambda phase: f"{phase.reduced / GIGA:.3f}"),
            _phase_row(plan, "  in reductions", lambda phase: str(len(phase.buckets))),
        ]
    if any(plan.phases[name].gathered for name in PHASES):
        rows.append(_phase_row(plan, "  weights gathered, GB", lambda phase: f"{phase.gathered / GIGA:.3f}"))
    reserve = f"* {setup.reserve / GIGA:g} GB left for what is no tensor's: context, NCCL, workspaces, fragmentation"
    return [*rows, reserve]


def describe_times(plan: Plan, schedule: Schedule, run: RunTime) -> list[str]:
    """Predicted times of a step and of the run, each speed-up beside its ceilings."""
    setup, cluster, gpu = plan.setup, plan.setup.cluster, GPUS[plan.setup.gpu]
    full, lora = plan.phases["full"], plan.phases["lora"]
    epochs = schedule.in_phase
    sent = []
    if lora.reduced:
        sent = [
            f"gradients on the network: FULL sends {full.reduced / lora.reduced:.1f}× what LORA sends, "
            f"the most that a step made of nothing but communication can gain"
        ]
    return [
        "",
        row("predicted step, ms", [phase.upper() for phase in PHASES]),
        *(_phase_row(plan, f"  {part}", _milliseconds(part)) for part in ("forward", "backward", "update")),
        _phase_row(plan, "  network, not hidden", _milliseconds("exposed")),
        _phase_row(plan, "  (network alone)", _milliseconds("network")),
        _phase_row(plan, "  step", _milliseconds("total")),
        _phase_row(plan, "  images a second, all GPUs", lambda p: f"{plan.global_batch / _total(p):,.0f}"),
        _phase_row(plan, "  speed-up over FULL", lambda p: f"{_total(full) / _total(p):.2f}×"),
        _phase_row(plan, "  its ceiling by FLOPs", lambda p: f"{full.flops / p.flops:.2f}×"),
        "",
        *sent,
        f"run: {epochs['full']} + {epochs['warmup']} + {epochs['lora']} epochs of {run.steps_per_epoch} steps: "
        f"{run.seconds / 3600:.1f} h, all FULL {run.baseline / 3600:.1f} h: {run.speedup:.2f}× "
        f"(ceiling by FLOPs {run.ceiling:.2f}×)",
        f"assumed: {100 * setup.reach.compute:.0f} % of {gpu.peak[setup.precision] / 1e12:g} TFLOP/s and "
        f"{100 * setup.reach.memory:.0f} % of {gpu.bandwidth / GIGA:,.0f} GB/s, operator by operator, eager; rings at "
        f"{100 * cluster.efficiency:.0f} % of {cluster.intra / GIGA:g} GB/s in a node of {cluster.per_node}, "
        f"{cluster.inter / GIGA:g} GB/s a node between; {1e6 * cluster.latency:.0f} µs a collective;",
        "  reductions run beside backward, each once its share of backward is done; no waiting for data",
        f"peaks: {gpu.source}",
    ]


def _item_row(plan: Plan, item: str) -> str:
    return _phase_row(plan, f"  {ITEM_NAMES.get(item, item)}", lambda phase: f"{phase.memory[item] / GIGA:.2f}")


def _milliseconds(part: str) -> Callable[[PhasePlan], str]:
    return lambda phase: f"{1000 * getattr(phase.time, part):.1f}"


def _total(phase: PhasePlan) -> float:
    assert phase.time is not None
    return phase.time.total


def _phase_row(plan: Plan, label: str, cell: Callable[[PhasePlan], str]) -> str:
    return row(label, [cell(plan.phases[name]) for name in PHASES])


def row(label: str, cells: Sequence[str], width: int = CELL) -> str:
    """A line of a table: its label, then its cells to the right of their columns."""
    return f"{label:<{LABEL}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
