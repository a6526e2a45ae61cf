"""Tiny models, one of each family, and short runs of them; the same every time, and no global random state moves."""

import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.utils.model_ema import ModelEmaV3

from prelora import PreLoRA, PreLoRAConfig

# Tiny operators: threads that wait for each other cost more than they bring, most of all on shared cores.
torch.set_num_threads(1)

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10}


def tiny_vit(seed=0, cls=VisionTransformer, **options):
    """A timm ViT of 3 blocks, 64 wide, on 32×32 images of 10 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**SIZE | options)


def without_qkv_bias(seed=0):
    return tiny_vit(seed, qkv_bias=False)


def layer_scale(seed=0):
    return tiny_vit(seed, init_values=0.1)


def deit(seed=0):
    """With a class and a distillation token, and a head on each."""
    return tiny_vit(seed, VisionTransformerDistilled)


def hf_vit(seed=0):
    """Transformers' ViTForImageClassification of the same size."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=8,
        num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


FAMILIES = {
    "vit": tiny_vit,
    "vit without qkv bias": without_qkv_bias,
    "vit with layer scale": layer_scale,
    "deit": deit,
    "hf vit": hf_vit,
}


def meta(name):
    """A timm model at its real size, without memory for it."""
    with torch.device("meta"):
        return timm.create_model(name)


def images(count=2, seed=1, dtype=torch.float32):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count=2, seed=1):
    return torch.randint(10, [count], generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def config(**fields):
    """Passes at the earliest epoch, with ranks that no tiny layer caps."""
    return PreLoRAConfig(
        **{"k": 2, "m": 1, "tau": 1e6, "zeta": 1e6, "r_min": 2, "r_max": 8, "warmup_epochs": 1} | fields
    )


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


def start(family="vit", optimizer=adamw, fields=None, wrap=lambda model: model, scheduler=None, ema=None, **options):
    """A run of a family's model, or of any factory's; ``optimizer``, ``scheduler`` and ``ema`` are factories, too."""
    model = family() if callable(family) else FAMILIES[family]()
    optimizer = optimizer(model.parameters())
    scheduler = scheduler and scheduler(optimizer)
    ema = ema and ema(model)
    return PreLoRA(wrap(model), optimizer, config(**fields or {}), scheduler=scheduler, ema=ema, **options)


def train(pre, steps=2, autocast=False):
    """Steps on batches that depend on the step alone; returns their mean loss."""
    total = 0.0
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = logits(pre.model, images(4, seed=pre.step))
        loss = F.cross_entropy(output.float(), labels(4, seed=pre.step))
        loss.backward()
        pre.optimizer.step()
        pre.optimizer.zero_grad()
        if pre.scheduler is not None:
            pre.scheduler.step()
        if isinstance(pre.ema, ModelEmaV3):
            pre.ema.update(pre.base_model)
        elif pre.ema is not None:
            pre.ema.update_parameters(pre.base_model)
        total += loss.item()
    return total / steps


def epochs(pre, count, **options):
    return [pre.end_epoch(train(pre, **options), probe=images()) for _ in range(count)]


def until(pre, phase):
    """The event that led into the phase; None if it was there."""
    event = None
    while pre.phase != phase:
        event = epochs(pre, 1)[0]
    return event
