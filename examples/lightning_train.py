"""Lightning with ``PreLoRACallback``, a tiny timm ViT on scikit-learn's digits.

python examples/lightning_train.py --output runs/lightning
python examples/lightning_train.py --output runs/lightning --devices 2
python examples/lightning_train.py --output runs/lightning --resume runs/lightning/last.ckpt
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from prelora import PreLoRAConfig
from prelora.integrations.lightning import PreLoRACallback

NAME = "vit_tiny_patch16_224"
MODEL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
HELD_OUT = 297


class Classifier(LightningModule):
    def __init__(self, lr=6e-3):
        super().__init__()
        self.save_hyperparameters()
        self.model = timm.create_model(NAME, **MODEL)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("top1", (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Report(Callback):
    """A line an epoch, of what PreLoRA found and did."""

    def __init__(self, prelora):
        self.prelora = prelora

    def on_train_epoch_end(self, trainer, pl_module):
        event = self.prelora.event
        if trainer.is_global_zero:
            top1 = 100 * trainer.callback_metrics["top1"]
            print(f"epoch {event.epoch} {event.phase:6} loss {event.loss:.3f} top-1 {top1:.1f} % | {event.reason}")


def digits():
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8).div(8).sub(1)
    images, labels = F.interpolate(images, scale_factor=2), torch.from_numpy(classes)
    parts = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    return [TensorDataset(images[part], labels[part]) for part in parts]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path, help="a checkpoint of this script")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    train, held_out = digits()
    prelora = PreLoRACallback(
        PreLoRAConfig(k=2, m=1, tau=2.0, zeta=50.0, r_min=2, r_max=8, warmup_epochs=2, deadline=4)
    )
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        callbacks=[prelora, Report(prelora), ModelCheckpoint(args.output, monitor="top1", mode="max", save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(train, batch_size=100 // args.devices, shuffle=True), DataLoader(held_out, batch_size=100)
    trainer.fit(Classifier(), *loaders, ckpt_path=args.resume)

    if trainer.is_global_zero:
        torch.save(prelora.pre.merged_state_dict(), args.output / "merged.pth")
        stock = timm.create_model(NAME, **MODEL, checkpoint_path=args.output / "merged.pth").eval()
        with torch.no_grad():
            images = held_out.tensors[0]
            difference = (stock(images) - prelora.pre.base_model.eval()(images)).abs().max().item()
        print(f"{args.output / 'merged.pth'} in a stock {NAME}: logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
