"""A loop in the style of timm's train.py, on scikit-learn's digits; each line that PreLoRA adds or changes says so.

python examples/timm_train.py --output runs/timm
torchrun --nproc-per-node=2 examples/timm_train.py --output runs/timm
python examples/timm_train.py --output runs/timm --resume runs/timm/last.pth.tar
"""

import argparse
from pathlib import Path

import timm
import torch
from sklearn.datasets import load_digits
from timm import utils
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.nn.parallel import DistributedDataParallel

import prelora  # PreLoRA

MODEL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
CONFIG = {"k": 2, "m": 1, "tau": 2, "zeta": 50, "r_min": 2, "r_max": 8, "warmup_epochs": 2, "deadline": 4}  # PreLoRA
HELD_OUT = 297

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("runs/timm"))
parser.add_argument("--resume", type=Path, help="a checkpoint of this script")
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--train-images", type=int, default=1500)
parser.add_argument("--batch-size", type=int, default=100, help="on each rank")
parser.add_argument("--opt", default="adamw")
parser.add_argument("--lr", type=float, default=6e-3)
parser.add_argument("--clip-grad", type=float, default=1.0)
parser.add_argument("--mixup", type=float, default=0.1)
parser.add_argument("--amp", action="store_true")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--checkpoint-hist", type=int, default=3)


class Merged:  # PreLoRA
    """What the saver takes for the model, or its average: in every phase the state dict of the plain one."""  # PreLoRA

    def __init__(self, pre, ema=False):  # PreLoRA
        self.pre, self.ema = pre, ema  # PreLoRA

    def state_dict(self):  # PreLoRA
        return self.pre.merged_state_dict(ema=self.ema)  # PreLoRA


def main(argv=None):
    args = parser.parse_args(argv)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed)
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8).div(8).sub(1).repeat_interleave(2, 2)
    images, labels = images.repeat_interleave(2, 3).to(device), torch.from_numpy(classes).to(device)
    train, held_out = (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])
    train = tuple(part[: args.train_images] for part in train)
    updates_per_epoch = args.train_images // (args.batch_size * args.world_size)

    model = timm.create_model(args.model, **MODEL).to(device)
    model_ema = utils.ModelEmaV3(model, decay=0.99, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=0.05)
    if args.distributed:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=args.epochs, warmup_epochs=1, step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    mixup_fn = Mixup(mixup_alpha=args.mixup, num_classes=MODEL["num_classes"])
    loss_fn = SoftTargetCrossEntropy()
    loss_scaler = utils.NativeScaler(device=device.type)
    config = prelora.PreLoRAConfig(**CONFIG)  # PreLoRA
    steps = updates_per_epoch * num_epochs  # PreLoRA
    pre = prelora.PreLoRA(model, optimizer, config, scheduler=lr_scheduler, ema=model_ema, total_steps=steps)  # PreLoRA

    saver = None
    if utils.is_primary(args):
        args.output.mkdir(parents=True, exist_ok=True)
        saver = utils.CheckpointSaver(
            Merged(pre),  # PreLoRA: instead of the model
            pre,  # PreLoRA: instead of the optimizer, which it saves with all else that a resume needs
            model_ema=Merged(pre, ema=True),  # PreLoRA: instead of model_ema
            amp_scaler=loss_scaler,
            checkpoint_dir=str(args.output),
            max_history=args.checkpoint_hist,
        )
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        pre.load_state_dict(checkpoint["optimizer"])  # PreLoRA: instead of the model's, optimizer's and EMA's
        loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
        if saver is not None:
            saver.load_state_dict_from_checkpoint(str(args.resume))

    for epoch in range(pre.epoch, num_epochs):  # PreLoRA: it counts the epochs
        utils.random_seed(args.seed + 1000 * epoch, args.rank)  # so that an epoch draws the same after a resume
        loss = train_one_epoch(epoch, pre, train, updates_per_epoch, mixup_fn, loss_fn, loss_scaler, args)
        event = pre.end_epoch(loss)  # PreLoRA
        pre.scheduler.step(epoch + 1)
        top1 = validate(pre.base_model, *held_out)
        if saver is not None:
            print(f"epoch {epoch} {event.phase:6} loss {event.loss:.3f} top-1 {top1:.1f} % | {event.reason}")
            saver.save_checkpoint(epoch, metric=top1)

    if utils.is_primary(args):
        torch.save(pre.merged_state_dict(), args.output / "merged.pth")  # PreLoRA
        stock = timm.create_model(args.model, **MODEL, checkpoint_path=args.output / "merged.pth").to(device)
        with torch.no_grad():
            difference = (stock.eval()(held_out[0]) - pre.base_model.eval()(held_out[0])).abs().max().item()
        print(f"{args.output / 'merged.pth'} in a stock {args.model}: logits differ by {difference:.1e}")
    return pre


def train_one_epoch(epoch, pre, train, updates_per_epoch, mixup_fn, loss_fn, loss_scaler, args):
    model, optimizer, lr_scheduler, model_ema = pre.model, pre.optimizer, pre.scheduler, pre.ema  # PreLoRA: the current
    losses = utils.AverageMeter()
    model.train()
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(args.seed + epoch))
    batches = order[args.rank :: args.world_size].split(args.batch_size)[:updates_per_epoch]
    for update, batch in enumerate(batches, start=epoch * updates_per_epoch + 1):
        images, target = mixup_fn(train[0][batch], train[1][batch])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            loss = loss_fn(model(images), target)
        optimizer.zero_grad()
        loss_scaler(loss, optimizer, clip_grad=args.clip_grad, parameters=model_parameters(model))
        model_ema.update(model, step=update)
        lr_scheduler.step_update(update)
        losses.update(loss.item(), images.size(0))
    return losses.avg


@torch.no_grad()
def validate(model, images, labels):
    return utils.accuracy(model.eval()(images), labels)[0].item()


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
