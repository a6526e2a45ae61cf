"""PreLoRA → PEFT → PreLoRA's layers → PEFT: train, hand over, train on in either, hand back.

    python examples/peft_roundtrip.py [FOLDER]

A tiny timm ViT on scikit-learn's digits goes through full training, joint warm-up and LoRA (a minute on two cores at
most). A run of the trainer is handed over by ``prelora export RUN --to peft`` instead of ``save_adapter``.
"""

import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import prelora
from prelora.integrations.peft import from_peft, to_peft
from prelora.integrations.peft_adapter import save_adapter

EPOCHS, BATCH = 6, 160


def build() -> torch.nn.Module:
    """The stock model, with fresh weights."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )


def load(folder: Path) -> PeftModel:
    """What anyone does who has PEFT and not PreLoRA."""
    stock = build()
    stock.load_state_dict(load_file(folder / "base.safetensors"), strict=True)
    return PeftModel.from_pretrained(stock, str(folder), is_trainable=True)


def train_epoch(model, optimizer, images, labels) -> float:
    """The mean loss."""
    losses = []
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        loss = F.cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def logits(model, images):
    return model.eval()(images)


def main(folder: Path) -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)

    # Train with PreLoRA; thresholds that always pass take a run this short through all three phases.
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    config = prelora.PreLoRAConfig(k=2, m=1, tau=1e4, zeta=1e4, warmup_epochs=2, r_min=2, r_max=8)
    pre = prelora.PreLoRA(model, optimizer, config)
    for _ in range(EPOCHS):
        event = pre.end_epoch(train_epoch(pre.model, pre.optimizer, images, labels))
        print(f"epoch {event.epoch}: {event.phase}, loss {event.loss:.3f}")
    trained = logits(pre.model, images)

    # Out: adapter_config.json and adapter_model.safetensors beside base.safetensors.
    adapter = save_adapter(pre.base_model, folder)
    peft_model = load(folder)
    torch.testing.assert_close(logits(peft_model, images), trained, rtol=1e-4, atol=1e-4)
    print(f"PEFT computes the same with {len(adapter.ranks)} layers of rank {sorted(set(adapter.ranks.values()))}")

    # Train on in PEFT, then with our layers: the optimizer stays, for the parameters do.
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=3e-3)
    print(f"in PEFT's layers: loss {train_epoch(peft_model, optimizer, images, labels):.3f}")
    model = from_peft(peft_model)
    print(f"in LoRALinear:    loss {train_epoch(model, optimizer, images, labels):.3f}")
    trained = logits(model, images)

    # Back: a PeftModel again, saved by PEFT, on the same base.
    to_peft(model).save_pretrained(str(folder))
    torch.testing.assert_close(logits(load(folder), images), trained, rtol=1e-4, atol=1e-4)
    print(f"saved by PEFT in {folder}, and loaded: the same logits")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
