"""``make_plan``: FLOPs, memory, communication and time of every phase before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from prelora.analysis.activations import saved_for_backward
from prelora.analysis.footprint import Footprint, Holding, Strategy, footprint, optimizer_state_bytes
from prelora.analysis.hardware import GIGA, GPUS, PAPERS_GPU, Cluster
from prelora.analysis.network import all_reduce_seconds, bucket_bytes, exposed_seconds, gather_seconds
from prelora.analysis.phases import PhaseModel, phase_models
from prelora.analysis.plan import ModelFlops, TargetCost, planned_execution
from prelora.analysis.roofline import Reach, count_step, seconds
from prelora.config import PreLoRAConfig
from prelora.sharding import blocks
from prelora.targets import Target


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained, and on what.

    Raises:
        ValueError: no such GPU, or a count below 1.
    """

    batch: int = 64
    """Images per GPU and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    precision: str = "bf16"
    optimizer: str = "adamw"
    """timm's name."""
    clips: bool = True
    """Gradients are clipped by their norm."""
    ema: bool = False
    strategy: Strategy = "ddp"
    bucket_view: bool = True
    """DDP's gradient_as_bucket_view."""
    compressed: bool = False
    """DDP's gradients travel in bf16."""
    gpu: str = PAPERS_GPU
    cluster: Cluster
    reach: Reach = field(default_factory=Reach)
    reserve: float = 2 * GIGA
    """Bytes that are no tensor's: CUDA's context, NCCL's buffers, libraries' workspaces, fragmentation."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise ValueError(f"gpu = {self.gpu!r}: accepted are {', '.join(GPUS)}")
        for name in ("batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of an optimizer step, by part."""

    forward: float
    backward: float
    update: float
    network: float
    """Of the collectives, were they alone."""
    exposed: float
    """What of them backward (with FSDP, forward too) does not hide."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.forward + self.backward + self.update + self.exposed


@dataclass(frozen=True)
class PhasePlan:
    """One phase, on one GPU."""

    flops: float
    """Per image, forward and backward."""
    trainable: int
    footprint: Footprint
    memory: dict[str, int]
    """Bytes by item at the planned batch."""
    largest_batch: int
    """Images per micro-batch that fit beside the reserve."""
    buckets: tuple[int, ...]
    """Bytes of each reduction of gradients, as they travel."""
    gathered: int
    """Bytes of parameters that FSDP gathers in a step."""
    time: StepTime | None
    """None: not predicted."""

    @property
    def reduced(self) -> int:
        """Bytes of gradients that are reduced in a step."""
        return sum(self.buckets)


@dataclass(frozen=True)
class Plan:
    """The three phases of one setup."""

    setup: Setup
    ranks: dict[str, int]
    parameters: int
    phases: dict[str, PhasePlan]

    @property
    def global_batch(self) -> int:
        """Images per optimizer step, over all GPUs."""
        return self.setup.batch * self.setup.accumulate * self.setup.cluster.gpus

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; of ``ranks`` only their mean and range."""
        ranks = list(self.ranks.values())
        return {
            "setup": asdict(self.setup),
            "ranks": {"mean": sum(ranks) / len(ranks), "min": min(ranks), "max": max(ranks)},
            "parameters": self.parameters,
            "global_batch": self.global_batch,
            "phases": {name: _phase_dict(phase) for name, phase in self.phases.items()},
        }


def make_plan(
    model: nn.Module,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    config: PreLoRAConfig,
    counted: ModelFlops,
    setup: Setup,
    *,
    image: Sequence[int],
    timed: bool = True,
) -> Plan:
    """Plan the three phases of a model; nothing is computed and ``model`` is not touched.

    Args:
        model: the plain model, without LoRA, on any device.
        ranks: by target name.
        counted: what ``count_model`` found of the model, targets and ``config.freeze``.
        image: [channels, height, width].
        timed: predict times too, which takes a few seconds for a large model.

    Raises:
        ValueError: the ranks' names are not the targets', or timm knows no such optimizer.
    """
    flops = counted.phases(ranks, planned_execution(config), config.train_lora_a).as_dict()
    holding = Holding(
        strategy=setup.strategy,
        gpus=setup.cluster.gpus,
        precision=setup.precision,
        state_bytes=optimizer_state_bytes(setup.optimizer),
        bucket_view=setup.bucket_view,
        ema=setup.ema,
        snapshot=config.log_updates,
        window_snapshot=config.keeps_windows,
        accumulates=setup.accumulate > 1,
    )
    phases = {
        name: _plan_phase(phase, flops[name], counted.targets, setup, holding, image, timed)
        for name, phase in phase_models(model, targets, ranks, config).items()
    }
    return Plan(setup, dict(ranks), sum(p.numel() for p in model.parameters()), phases)


def _plan_phase(
    phase: PhaseModel,
    flops: float,
    costs: Mapping[str, TargetCost],
    setup: Setup,
    holding: Holding,
    image: Sequence[int],
    timed: bool,
) -> PhasePlan:
    held = footprint(phase, saved_for_backward(phase.model, image, setup.precision), costs, holding)
    buckets = _buckets(phase, setup)
    parameters = sum(parameter.nbytes for parameter in phase.model.parameters())
    return PhasePlan(
        flops=flops,
        trainable=phase.trainable,
        footprint=held,
        memory=held.items(setup.batch),
        largest_batch=held.largest_batch(GPUS[setup.gpu].memory - setup.reserve),
        buckets=tuple(buckets),
        gathered=2 * setup.accumulate * parameters if setup.strategy == "fsdp" and setup.cluster.gpus > 1 else 0,
        time=_step_time(phase, setup, holding, image, buckets, parameters) if timed else None,
    )


def _buckets(phase: PhaseModel, setup: Setup) -> list[int]:
    if setup.cluster.gpus == 1:
        return []
    trained = [parameter.nbytes for parameter in reversed(phase.reduced())]
    if setup.strategy == "fsdp":
        units = _units(phase)
        return [sum(trained) // units] * units
    return [size // 2 if setup.compressed else size for size in bucket_bytes(trained)]


def _units(phase: PhaseModel) -> int:
    """Modules that FSDP gathers one after another: the blocks and the root."""
    return 1 + len(blocks(phase.model))


def _step_time(
    phase: PhaseModel, setup: Setup, holding: Holding, image: Sequence[int], buckets: Sequence[int], parameters: int
) -> StepTime:
    work = count_step(phase, image, setup.batch, setup.precision, holding.state_bytes, clips=setup.clips)
    parts = [work.forward, work.backward, work.update]
    gpu, cluster = GPUS[setup.gpu], setup.cluster
    forward, backward, update = (seconds(calls, gpu, setup.precision, setup.reach) for calls in parts)
    forward, backward = forward * setup.accumulate, backward * setup.accumulate
    if setup.strategy == "ddp":
        reductions = [all_reduce_seconds(size, cluster) for size in buckets]
        return StepTime(forward, backward, update, sum(reductions), exposed_seconds(reductions, backward))
    units = _units(phase)
    gather, scatter = gather_seconds(parameters / units, cluster), gather_seconds(sum(buckets) / units, cluster)
    gathers = [gather] * units * setup.accumulate
    both = [gather] * units * (setup.accumulate - 1) + [gather + scatter] * units
    exposed = exposed_seconds(gathers, forward) + exposed_seconds(both, backward)
    return StepTime(forward, backward, update / cluster.gpus, sum(gathers) + sum(both), exposed)


def _phase_dict(phase: PhasePlan) -> dict[str, Any]:
    time = phase.time
    return {
        "flops_per_image": phase.flops,
        "trainable": phase.trainable,
        "memory": phase.memory,
        "memory_total": sum(phase.memory.values()),
        "largest_batch": phase.largest_batch,
        "reduced_bytes": phase.reduced,
        "buckets": len(phase.buckets),
        "gathered_bytes": phase.gathered,
        "seconds": {**asdict(time), "step": time.total} if time is not None else None,
    }
