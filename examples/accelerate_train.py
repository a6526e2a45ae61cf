"""A tiny ViT on scikit-learn's digits, through all three phases, in a loop of its own under accelerate.

    python examples/accelerate_train.py
    torchrun --nproc-per-node=2 examples/accelerate_train.py     # or accelerate launch
    python examples/accelerate_train.py --resume                 # from what was saved last

What PreLoRA adds to the loop is marked.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from prelora import PreLoRAConfig
from prelora.integrations.accelerate import AcceleratedPreLoRA

EPOCHS, ACCUMULATE, SAVE_EVERY, SEED = 5, 2, 16, 0
TRAIN_SAMPLES = 1024


class Progress:
    """Where the run stands, and this epoch's losses; accelerate saves it with everything else."""

    def __init__(self):
        self.epoch = self.batches = 0
        self.loss_sum = 0.0

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


def digits():
    """1,797 grey 8×8 images, enlarged to 16×16: a training and a held-out set."""
    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, size=16)
    labels = torch.from_numpy(labels).long()
    train = TensorDataset(images[:TRAIN_SAMPLES], labels[:TRAIN_SAMPLES])
    return train, (images[TRAIN_SAMPLES:], labels[TRAIN_SAMPLES:])


def build_model():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_channels=1,
            num_labels=10,
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"), help="folder of what is saved")
    parser.add_argument("--resume", action="store_true", help="go on from what was saved last")
    options = parser.parse_args()

    # Seeded by epoch, so that a resumed epoch has the order it had.
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=SEED)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), gradient_accumulation_steps=ACCUMULATE, dataloader_config=loading
    )
    set_seed(SEED)
    model = build_model()
    set_seed(SEED, device_specific=True)
    train, (images, labels) = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    # A generator of its own: beginning the loader anew in a resumed epoch leaves alone what dropout draws from.
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True, generator=torch.Generator())
    # accelerate steps the scheduler once for every process, at every optimizer step.
    steps = EPOCHS * len(loader) // ACCUMULATE
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    pre = AcceleratedPreLoRA(  # PreLoRA: a run this short does not converge, the deadline has it switch after epoch 3
        accelerator,
        model,
        optimizer,
        PreLoRAConfig(k=2, m=1, deadline=3, warmup_epochs=1, r_min=2, r_max=8),
        scheduler=scheduler,
        seed=SEED,
    )
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    saved = options.output / "last"
    if options.resume:
        accelerator.load_state(str(saved))  # PreLoRA: rebuilds the saved phase's structure first

    while progress.epoch < EPOCHS:
        pre.model.train()
        loader.set_epoch(progress.epoch)
        for batch, targets in accelerator.skip_first_batches(loader, progress.batches):
            with accelerator.accumulate(pre.model):  # PreLoRA: pre.model, in place of model
                loss = F.cross_entropy(pre.model(batch).logits, targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(pre.model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.loss_sum += accelerator.reduce(loss.detach(), "mean").item()
            progress.batches += 1
            if progress.batches % SAVE_EVERY == 0 and accelerator.sync_gradients:
                accelerator.save_state(str(saved))
        event = pre.end_epoch(progress.loss_sum / progress.batches)  # PreLoRA: on every rank
        progress.epoch, progress.batches, progress.loss_sum = progress.epoch + 1, 0, 0.0
        accelerator.save_state(str(saved))

        pre.model.eval()
        with torch.no_grad():
            guesses = pre.base_model(images.to(accelerator.device)).logits.argmax(-1).cpu()
        accelerator.print(
            f"epoch {event.epoch}: {event.phase}, loss {event.loss:.3f}, "
            f"accuracy {(guesses == labels).float().mean():.3f}, {event.trainable_share:.0%} train; {event.reason}"
        )

    if accelerator.is_main_process:
        stock = build_model()
        stock.load_state_dict(pre.merged_state_dict(), strict=True)  # PreLoRA: the plain model
        stock.save_pretrained(options.output / "final")
        print(f"{options.output / 'final'} is a stock {type(stock).__name__}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
