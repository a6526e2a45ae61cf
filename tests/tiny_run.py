"""A config whose run takes all three phases in seconds."""

import dataclasses

from prelora import PreLoRAConfig
from prelora.train.config import DataConfig, ModelConfig, OptimConfig, TrainConfig

TINY = TrainConfig(
    epochs=4,
    ema_decay=0.9,
    prelora=PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, warmup_epochs=1, r_min=1, r_max=4),
    model=ModelConfig(image_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2),
    data=DataConfig(batch_size=320),
    optim=OptimConfig(clip_grad=1.0),
)


def tiny(output, **changes):
    """``TINY`` in ``output``; a change given as a dict goes into the part of that name."""
    parts = {
        name: dataclasses.replace(getattr(TINY, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(TINY, output=output, **parts)
