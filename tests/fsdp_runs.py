"""Short runs on as many ranks as there are, plain, in DDP or in FSDP2, on the same global batches."""

import contextlib

import torch
from models import tiny_vit
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from prelora import PreLoRA, PreLoRAConfig, distributed, sharding, shards
from prelora.nn import merge_once

RANKS, EPOCHS, STEPS, ACCUMULATE, BATCH = 4, 5, 1, 2, 8
PHASES = ["full", "warmup", "warmup", "lora", "lora"]
"""After each epoch."""
CONFIG = {"k": 2, "m": 1, "tau": 1e6, "zeta": 1e6, "warmup_epochs": 2, "r_min": 1, "r_max": 4}


def vit(dtype=torch.float64):
    """Rows that four ranks cannot share evenly, neither of the weights nor of a fused weight's slices."""
    return tiny_vit(depth=2, embed_dim=30).to(dtype)


def plain(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    return sharding.shard(model, torch.device("cpu"))


def one_unit(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (distributed.world_size(),)))


def hybrid(model):
    """Two replicas, each over two ranks, whose weights stay gathered from forward to backward."""
    mesh = init_device_mesh("cpu", (2, distributed.world_size() // 2), mesh_dim_names=("replicas", "shards"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def compiled(model):
    model.blocks[0].compile(backend="eager")
    return fsdp(model)


def mixed(model):
    """bf16 weights to compute with, fp32 ones to keep."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def start(wrap, dtype=torch.float64, fields=None, average=True, **options):
    model = vit(dtype)
    ema = ModelEmaV3(model, decay=0.9) if average else None
    if ema is not None and wrap is not ddp:
        wrap(ema.module)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    return PreLoRA(wrapped, optimizer, PreLoRAConfig(**CONFIG | (fields or {})), ema=ema, total_steps=20, **options)


def batch(step, micro, dtype=torch.float64):
    """This rank's part of a global batch that depends on the step alone."""
    seed = torch.Generator().manual_seed(10 * step + micro)
    images = torch.randn(BATCH, 3, 32, 32, generator=seed, dtype=torch.float64).to(dtype)
    labels = torch.randint(10, [BATCH], generator=seed)
    return tuple(part.chunk(distributed.world_size())[distributed.rank()] for part in (images, labels))


def train(pre, steps=STEPS, dtype=torch.float64, autocast=False):
    """Steps of accumulated micro-batches, clipped; returns the mean loss of each, over ranks, and the norms."""
    losses, norms = [], []
    for _ in range(steps):
        with merge_once(pre.base_model):
            for micro in range(ACCUMULATE):
                images, labels = batch(pre.step, micro, dtype)
                quiet = distributed.no_sync(pre.model) if micro < ACCUMULATE - 1 else contextlib.nullcontext()
                with quiet, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = nn.functional.cross_entropy(pre.model(images).to(dtype), labels)
                    (loss / ACCUMULATE).backward()
                losses.append(distributed.mean_over_ranks(loss.item()))
        pre.finish_gradients()
        norm = nn.utils.clip_grad_norm_(pre.model.parameters(), 1.0)
        norms.append(shards.full(norm).item())
        pre.optimizer.step()
        pre.optimizer.zero_grad()
        if pre.ema is not None:
            pre.ema.update(pre.base_model)
    return losses, norms


@torch.no_grad()
def evaluate(pre, images):
    """Forwards alone, after which FSDP2 leaves the roots gathered."""
    pre.model.eval()(images)
    pre.model.train()
    if pre.ema is not None:
        pre.ema.module(images)


def end(pre, losses, dtype=torch.float64):
    evaluate(pre, batch(0, 0, dtype)[0])
    return pre.end_epoch(sum(losses) / len(losses), probe=batch(0, 0, dtype)[0])
