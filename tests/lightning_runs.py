"""Short runs of a LightningModule around a tiny ViT, the same every time, alone or on ranks that are there already."""

import logging
import os
import warnings

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from models import config, images, labels, tiny_vit
from timm.utils.model_ema import ModelEmaV3

from prelora import distributed
from prelora.integrations.lightning import PreLoRACallback

BATCHES, EPOCHS = 3, 5
PHASES = ["full", "warmup", "lora", "lora", "lora"]
"""At each epoch's end: FULL for two epochs, WARMUP for one, LORA for two."""

# Of Lightning, about loaders without workers, short epochs, folders that are there and the like.
warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(LightningModule):
    """A ViT, an average of it, and a scale beside it that trains, too."""

    def __init__(self, seed=0):
        super().__init__()
        self.model = tiny_vit(seed, depth=2, embed_dim=32)
        self.average = ModelEmaV3(self.model, decay=0.9).requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.ones(10))

    def forward(self, x):
        return self.model(x) * self.scale

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *arguments, **options):
        super().optimizer_step(*arguments, **options)
        self.average.update(self.model)


class Recording(Module):
    """Keeps what training_step returned."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return {"loss": loss}


class Manual(Recording):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        found = super().training_step(batch, batch_idx)
        self.optimizers().zero_grad()
        self.manual_backward(found["loss"])
        self.optimizers().step()
        self.lr_schedulers().step()
        return found


class Batches:
    """A loader that goes on where it was, each rank with batches of its own; Lightning tells its sampler the epoch."""

    def __init__(self, count=BATCHES):
        self.sampler = self.batch_sampler = self
        self.count = count
        self.epoch = self.done = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        first, self.done = self.done % self.count, 0
        for index in range(first, self.count):
            self.done = index + 1
            seed = 2 * (self.epoch * self.count + index) + distributed.rank()
            yield images(4, seed=seed), labels(4, seed=seed)

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


class Events(Callback):
    """What each epoch's end found and did, as another callback sees it."""

    def __init__(self, ours):
        self.ours = ours
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(self.ours.event)


def trainer(callbacks, epochs=EPOCHS, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    one = {"accelerator": "cpu", "devices": 1}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        **quiet | one | {"enable_checkpointing": checkpoints, "max_epochs": epochs} | options, callbacks=callbacks
    )


def saving(folder, kind):
    """Keep every checkpoint of a kind: after each batch, after each validation, at each epoch's end."""
    when = {
        "batch": {"every_n_train_steps": 1},
        "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False, "mode": "max"},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }[kind]
    return ModelCheckpoint(folder, filename=f"{kind}-{{step}}", auto_insert_metric_name=False, save_top_k=-1, **when)


def fit(folder=None, kinds=(), ckpt_path=None, module=None, fields=None, callbacks=(), options=None):
    """A run to its end; the module, our callback and every epoch's event."""
    module = Module() if module is None else module
    ours = PreLoRACallback(config(**fields or {}), ema="average" if hasattr(module, "average") else None)
    events = Events(ours)
    run = trainer([ours, events, *callbacks, *(saving(folder, kind) for kind in kinds)], **options or {})
    run.fit(module, Batches(), Batches(1), ckpt_path=ckpt_path)
    return module, ours, events.seen


def outcome(module, ours):
    """Everything that a run leaves: PreLoRA's state holds the ViT, its average, moments, scheduler and history."""
    state = ours.pre.state_dict()
    # torch's load_state_dict of an optimizer gives a group's options another order.
    groups = [dict(sorted(group.items())) for group in state["optimizer"]["groups"]]
    return state | {"optimizer": state["optimizer"] | {"groups": groups}, "module": module.state_dict()}


def plain(tree):
    """Tensors as nested lists of their exact values."""
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


# On ranks that are a process group already.


def on_ranks(**strategy):
    here, world = distributed.rank(), distributed.world_size()
    os.environ |= {"RANK": str(here), "LOCAL_RANK": str(here), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    ddp = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo", **strategy)
    return {"strategy": ddp, "devices": world, "use_distributed_sampler": False}


def fit_on_ranks(folder, kinds, ckpt_path=None):
    module, ours, _ = fit(folder, kinds, ckpt_path=ckpt_path, options=on_ranks())
    return plain(outcome(module, ours))


def refusal_of_static_graph():
    try:
        fit(module=Manual(), options=on_ranks(static_graph=True))
    except TypeError as error:
        return str(error)
    return None
