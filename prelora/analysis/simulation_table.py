"""Closed form and simulation of a plan side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prelora.analysis.hardware import GIGA, GPUS
from prelora.analysis.plan_table import row
from prelora.analysis.planner import PhasePlan, Plan
from prelora.analysis.simulation import SimulatedPhase
from prelora.units import PHASES

CELL = 30


def describe_simulation(plan: Plan, simulated: Mapping[str, SimulatedPhase]) -> list[str]:
    """Closed form and simulation side by side: GB, and by how much the simulation differs."""
    lines = ["", f"closed form | simulated on fake tensors, rank 0 of {plan.setup.cluster.gpus} | difference"]
    lines.append(row("", [phase.upper() for phase in PHASES], CELL))
    pairs: dict[str, Callable[[PhasePlan, SimulatedPhase], tuple[float, float]]] = {
        "parameters, GB": lambda p, s: (_gb(p, "weights", "lora"), s.parameters / GIGA),
        "optimizer, GB": lambda p, s: (_gb(p, "optimizer"), s.optimizer / GIGA),
        "gradients and buckets, GB": lambda p, s: (_gb(p, "gradients", "buckets"), s.gradients / GIGA),
        "kept for backward, GB": lambda p, s: (_gb(p, "w_eff", "activations"), s.forward / GIGA),
        "backward's workspace, GB": lambda p, s: (_gb(p, "workspace"), s.workspace / GIGA),
        "all-reduced, GB": lambda p, s: (p.reduced / GIGA, sum(s.buckets) / GIGA),
        "buckets": lambda p, s: (len(p.buckets), len(s.buckets)),
    }
    for label, both in pairs.items():
        cells = [_compared(*both(plan.phases[name], simulated[name])) for name in PHASES]
        lines.append(row(label, cells, CELL))
    memory = GPUS[plan.setup.gpu].memory - plan.setup.reserve
    cells = []
    for name in PHASES:
        planned = plan.phases[name]
        beside = sum(planned.memory[item] for item in ("ema", "snapshot"))  # a step does not touch them
        cells.append(_compared(planned.largest_batch, simulated[name].largest_batch(plan.setup.batch, memory - beside)))
    return [*lines, row("images that fit", cells, CELL)]


def _compared(closed: float, simulated: float) -> str:
    difference = f"{round(100 * (simulated / closed - 1), 1) + 0.0:+} %" if closed else "-"  # + 0.0: no minus zero
    digits = 0 if isinstance(closed, int) else 3
    return f"{closed:.{digits}f} | {simulated:.{digits}f} | {difference}"


def _gb(phase: PhasePlan, *items: str) -> float:
    return sum(phase.memory[item] for item in items) / GIGA
