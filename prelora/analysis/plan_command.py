"""``prelora plan``: what a model costs in each phase on GPUs that need not be there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn
from torch.optim import Optimizer

from prelora.analysis.hardware import GIGA, GPUS, PAPERS_GPU, PAPERS_INTER, PAPERS_PER_NODE, Cluster
from prelora.analysis.plan import count_model
from prelora.analysis.plan_table import describe_phases, describe_setup, describe_times
from prelora.analysis.planner import Plan, Setup, make_plan
from prelora.analysis.records import load_run
from prelora.analysis.roofline import Reach
from prelora.analysis.run_time import Schedule, run_time
from prelora.analysis.simulation import SimulatedPhase, simulate
from prelora.analysis.simulation_table import describe_simulation
from prelora.config import Freeze, PreLoRAConfig
from prelora.data import imagenet
from prelora.precision import Precision
from prelora.targets import Target, find_targets
from prelora.train.config import ModelConfig
from prelora.train.model import build_model


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """FLOPs, memory, communication and time of FULL, WARMUP and LORA, counted and predicted: nothing is run.

    The defaults are the paper's: ViT-L/16 on 64 A100-40GB, four a node, as in ALCF's Polaris.
    """

    model: str = "vit_large_patch16_224"
    """timm's model name."""
    image_size: int = 224
    """Side in pixels."""
    rank: int = 32
    """LoRA's rank everywhere; costs are linear in it, so the mean of a plan stands for it. See also run."""
    run: Path | None = None
    """A run's folder, whose ranks are taken instead."""
    freeze: Freeze = "targets"
    train_lora_a: bool = True
    """Whether A trains on after the freeze (False: LoRA-FA)."""
    execution: Literal["merged", "two_path"] = "merged"
    log_updates: bool = True
    """Keep the targets' weights of the epoch before, for update norms."""
    optimizer: str = "adamw"
    """timm's name."""
    clip: bool = True
    """Gradients are clipped by their norm."""
    ema: bool = False
    """Keep an average of the weights."""
    batch: int = 64
    """Images per GPU and micro-batch."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    precision: Precision = "bf16"
    """Of the products; the weights are fp32 always."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    compress: bool = False
    """DDP's gradients travel in bf16."""
    bucket_view: bool = True
    """DDP's gradients are views of its buckets."""
    gpu: Literal["A100-40GB", "A100-80GB", "H100-80GB", "H200-141GB"] = PAPERS_GPU
    gpus: int = 64
    gpus_per_node: int = PAPERS_PER_NODE
    intra: float | None = None
    """GB/s in each direction between the GPUs of a node; None: the GPU's NVLink."""
    inter: float = PAPERS_INTER / GIGA
    """GB/s in each direction of a node's network adapters together; two of 200 Gb/s by default."""
    reach_compute: float = Reach.compute
    """Share of the data sheet's FLOP/s that matrix products reach."""
    reach_memory: float = Reach.memory
    """Share of the data sheet's memory bandwidth that operators reach."""
    reach_network: float = 0.8
    """Share of the links' bandwidth that collectives reach."""
    latency: float = 50.0
    """Microseconds of a collective, whatever its size."""
    reserve: float = 2.0
    """GB that are no tensor's: CUDA's context, NCCL's buffers, workspaces, fragmentation."""
    epochs: int = 300
    switch_epoch: int = 150
    """Epochs in FULL."""
    warmup_epochs: int = 10
    """Epochs in WARMUP."""
    images: int = imagenet.TRAIN_IMAGES
    """Training images."""
    simulate: bool = False
    """Also take a step of each phase as one of the GPUs, on fake tensors: the real DDP and switch (DDP only)."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON."""


def main(arguments: Sequence[str]) -> str:
    """The plan that the command line asks for, as text.

    Raises:
        ValueError: a value out of range, or one that does not fit another.
        SystemExit: on help, or on arguments that do not parse.
    """
    options = tyro.cli(PlanOptions, args=arguments, prog="prelora plan")
    with torch.device("meta"):
        sizes = ModelConfig(name=options.model, image_size=options.image_size)
        model = build_model(sizes, classes=imagenet.CLASSES, channels=imagenet.CHANNELS)
    targets = find_targets(model)
    ranks = _ranks(options, targets)
    config = PreLoRAConfig(
        freeze=options.freeze,
        train_lora_a=options.train_lora_a,
        execution=options.execution,
        log_updates=options.log_updates,
    )
    setup, schedule = _setup(options), _schedule(options)
    image = (imagenet.CHANNELS, options.image_size, options.image_size)
    counted = count_model(model, targets, torch.empty(1, *image, device="meta"), freeze=config.freeze)
    plan = make_plan(model, targets, ranks, config, counted, setup, image=image)
    simulated = _simulate(options, model, targets, ranks, config, image) if options.simulate else None
    if options.as_json:
        return _json(options, plan, schedule, simulated)
    lines = [*describe_setup(options.model, plan), *describe_phases(plan)]
    lines += describe_times(plan, schedule, run_time(plan, schedule))
    return "\n".join(lines + (describe_simulation(plan, simulated) if simulated is not None else []))


def _ranks(options: PlanOptions, targets: Sequence[Target]) -> dict[str, int]:
    names = {target.name for target in targets}
    if options.run is None:
        if options.rank < 1:
            raise ValueError(f"rank = {options.rank}: must be at least 1")
        return dict.fromkeys(names, options.rank)
    ranks = load_run(options.run).ranks
    if not ranks:
        raise ValueError(f"run = {options.run}: it has not switched yet, so it has no ranks; give rank instead")
    if set(ranks) != names:
        raise ValueError(f"run = {options.run}: its targets are not those of {options.model}; give the run's model")
    return dict(ranks)


def _setup(options: PlanOptions) -> Setup:
    intra = GPUS[options.gpu].link if options.intra is None else options.intra * GIGA
    cluster = Cluster(
        gpus=options.gpus,
        per_node=options.gpus_per_node,
        intra=intra,
        inter=options.inter * GIGA,
        efficiency=options.reach_network,
        latency=options.latency / 1e6,
    )
    return Setup(
        batch=options.batch,
        accumulate=options.accumulate,
        precision=options.precision,
        optimizer=options.optimizer,
        clips=options.clip,
        ema=options.ema,
        strategy=options.strategy,
        bucket_view=options.bucket_view,
        compressed=options.compress,
        gpu=options.gpu,
        cluster=cluster,
        reach=Reach(options.reach_compute, options.reach_memory),
        reserve=options.reserve * GIGA,
    )


def _schedule(options: PlanOptions) -> Schedule:
    return Schedule(
        epochs=options.epochs, switch=options.switch_epoch, warmup=options.warmup_epochs, images=options.images
    )


def _simulate(
    options: PlanOptions,
    model: nn.Module,
    targets: Sequence[Target],
    ranks: Mapping[str, int],
    config: PreLoRAConfig,
    image: Sequence[int],
) -> dict[str, SimulatedPhase]:
    if options.strategy != "ddp" or options.gpus == 1:
        raise ValueError("simulate: accepted with strategy ddp and more than one GPU")

    def build(model: nn.Module) -> Optimizer:
        from timm.optim import create_optimizer_v2

        return create_optimizer_v2(model, opt=options.optimizer, lr=1e-3, weight_decay=0.1)

    return simulate(
        model,
        targets,
        ranks,
        config,
        image=image,
        batch=options.batch,
        precision=options.precision,
        gpus=options.gpus,
        build_optimizer=build,
        bucket_view=options.bucket_view,
    )


def _json(options: PlanOptions, plan: Plan, schedule: Schedule, simulated: Mapping[str, SimulatedPhase] | None) -> str:
    written: dict[str, Any] = {"model": options.model, "image_size": options.image_size, **plan.as_dict()}
    written["run"] = {**asdict(schedule), **run_time(plan, schedule).as_dict()}
    written["simulated"] = {name: asdict(phase) for name, phase in simulated.items()} if simulated else None
    return json.dumps(written, indent=2)
