"""Short runs of transformers' Trainer with PreLoRA, on noise."""

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from prelora import PreLoRAConfig
from prelora.integrations.transformers import PreLoRATrainer

EPOCHS, STEPS = 4, 4
"""Steps an epoch: 32 images in micro-batches of 4, two of them a step."""
PHASES = ["full", "warmup", "lora", "lora"]
"""After each epoch; thresholds that always pass."""
CONFIG = PreLoRAConfig(k=2, m=1, tau=1e6, zeta=1e6, r_min=2, r_max=8, warmup_epochs=1, lora_lr_mult=2.0)
NEVER = PreLoRAConfig(tau=1e-9)


def vit(cls=ViTForImageClassification):
    """A ViT of 2 blocks, 32 wide, on grey 16×16 images, with dropout; the same every time."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
        patch_size=8, num_channels=1, num_labels=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config)


def images(count=32):
    noise = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(count, 1, 16, 16, generator=noise), torch.randint(10, [count], generator=noise)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def arguments(output, **changes):
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": EPOCHS, "seed": 3,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.05,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(output), **settings | changes)


def build(output, model=None, config=CONFIG, callbacks=None, optimizers=(None, None), targets=None, **changes):
    return PreLoRATrainer(
        vit() if model is None else model,
        arguments(output, **changes),
        train_dataset=images(),
        eval_dataset=images(8),
        prelora_config=config,
        targets=targets,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def trained(output, model=None, resume=None, **changes):
    trainer = build(output, model, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
