"""Top-1 and top-5 accuracy over all ranks, every sample counted once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from prelora import distributed
from prelora.controller import logits
from prelora.data import Source
from prelora.data.sampler import eval_batches
from prelora.sharding import is_sharded


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    *,
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    between: Callable[[], None],
    image_size: int,
) -> dict[str, float]:
    """Mean cross-entropy and accuracies in percent.

    Args:
        model: the plain model; it is put into eval mode and back.
        between: called before each batch on all ranks, as often on each; may raise to abandon the evaluation.
        image_size: side of the images in pixels.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    indices = list(eval_batches(source.eval_samples, batch_size=batch_size, rank=rank, world_size=world_size))
    batches = source.evaluate(indices)
    rounds = math.ceil(math.ceil(source.eval_samples / world_size) / batch_size)
    top = min(5, source.classes)
    sums = torch.zeros(4, dtype=torch.float64)  # loss, top-1, top-5, images
    training = model.training
    model.eval()
    try:
        for _ in range(rounds):
            between()
            batch = next(batches, None)
            if batch is None:
                if is_sharded(model):  # its parameters are gathered by all ranks or by none
                    with autocast():
                        model(torch.zeros(1, source.channels, image_size, image_size, device=device))
                continue
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            with autocast():
                output = logits(model(images)).float()
            hits = output.topk(top).indices == labels[:, None]
            loss = F.cross_entropy(output, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(labels))]).double().cpu()
    finally:
        model.train(training)
    if world_size > 1:
        sums = sums.to(distributed.collective_device())
        dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": int(images)}
