"""``PreLoRACallback``: PreLoRA inside Lightning's ``Trainer.fit``, with its checkpoints, under DDP too."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from prelora import distributed
from prelora.config import PreLoRAConfig
from prelora.controller import PreLoRA
from prelora.errors import CheckpointError, OptimizerError
from prelora.events import Event
from prelora.nn import LoRALinear
from prelora.targets import Layout, Target, by_group
from prelora.units import PHASES

KEY = "prelora"
"""Of the checkpoint's entry that holds PreLoRA's state, and of what is logged."""
AVERAGES = (
    "keeps a copy of the model that the switch does not reach: hold timm's ModelEmaV3 in the module, and pass ema="
)
SEARCHES = "trains inside of fit: run it with a Trainer of its own, without PreLoRACallback"
REFUSED_CALLBACKS = {
    "BaseFinetuning": "freezes and unfreezes by itself: PreLoRACallback decides what trains",
    "BatchSizeFinder": SEARCHES,
    "LearningRateFinder": SEARCHES,
    "ModelPruning": "computes the weights anew in every forward: prune the model that pre.merged_state_dict() gives",
    "StochasticWeightAveraging": AVERAGES,
    "WeightAveraging": AVERAGES,
}
REFUSED_PRECISIONS = ("BitsandbytesPrecision", "TransformerEnginePrecision")


class PreLoRACallback(Callback):
    """Takes the ViT of a LightningModule, and the Trainer's optimizer, through FULL, WARMUP and LORA.

    An epoch's loss is the mean of what ``training_step`` returned. The epoch ends before a checkpoint of its end is
    saved; such a checkpoint, and one from within an epoch, resume by ``trainer.fit(ckpt_path=...)`` in any phase. To
    the outside the LightningModule's state dict stays that of the plain model: W + s·B·A stands under W's name, so
    that every checkpoint loads into a module without LoRA.

    Args:
        config: None: the defaults.
        model: the attribute of the LightningModule that holds the ViT, as ``"model"`` or ``"net.vit"``, or a function
            that takes the LightningModule and returns it; compiled or not.
        ema: likewise, an average of the ViT (timm's ``ModelEmaV3``) to be carried along; None: there is none.
        targets: as in ``PreLoRA``.
        seed: as in ``PreLoRA``.

    ``fit`` raises before it trains:
        TypeError: a strategy, its options, a precision or another callback that the switch cannot go through.
        OptimizerError: more than one optimizer or scheduler, or one that cannot be rebuilt.
        TargetError, AttributeError: no ViT there, or one whose layers cannot carry LoRA, as tied ones.
        CheckpointError: ``ckpt_path`` was saved without PreLoRACallback, or with another config or model.
        RuntimeError: the model carries LoRA from an earlier ``fit``.
    """

    def __init__(
        self,
        config: PreLoRAConfig | None = None,
        *,
        model: str | Callable[[LightningModule], nn.Module] = "model",
        ema: str | Callable[[LightningModule], Any] | None = None,
        targets: Layout | Sequence[Target] | str | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.model = model
        self.ema = ema
        self.targets = targets
        self.seed = seed
        self.pre: PreLoRA | None = None
        """The controller of the last ``fit``, from its start on."""
        self.event: Event | None = None
        """What the last epoch's end found and did."""
        self._saved: dict[str, Any] | None = None
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._loss: Any = 0.0
        self._batches = 0
        self._overdue = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot go through the switch."""
        if stage == "fit":
            _check_trainer(trainer)
            self.pre = self.event = self._saved = None
            self._begin_epoch()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep PreLoRA's state for ``on_fit_start``, when there is an optimizer to rebuild."""
        if trainer.state.fn != "fit":
            return
        if KEY not in checkpoint:
            raise CheckpointError(
                "the checkpoint was saved without PreLoRACallback: to start from its weights, load them into the "
                "module and call fit without ckpt_path"
            )
        self._saved = checkpoint[KEY]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the controller, and the structure of the phase that the checkpoint was saved in."""
        model = _member(pl_module, "model", self.model)
        if any(isinstance(module, LoRALinear) for module in model.modules()):
            raise RuntimeError(
                f"{type(pl_module).__name__} carries LoRA from an earlier fit: build it anew; to go on, pass ckpt_path="
            )
        _check_wrapper(_wrapped(trainer), pl_module)
        optimizer, scheduler = _only_optimizer(trainer)
        self.pre = PreLoRA(
            model,
            optimizer,
            self.config,
            targets=self.targets,
            scheduler=scheduler,
            ema=None if self.ema is None else _member(pl_module, "ema", self.ema),
            seed=self.seed,
        )
        pl_module.register_state_dict_post_hook(_merge)
        pl_module.register_load_state_dict_pre_hook(_make_room)
        if self._saved is not None:
            self.pre.load_state_dict(self._saved["state"])
            loss, batches = map(distributed.own_share, zip(*self._saved["epoch"], strict=True))
            self._loss, self._batches = loss, int(batches)
            self._overdue = self._saved["epoch_complete"]
            self._saved = None
            if self.pre.phase != "full":
                self._install(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the controller how long the run is: only now may the data loaders be asked."""
        total = trainer.estimated_stepping_batches
        self._started.total_steps = int(total) if 0 < total < math.inf else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the epoch whose last batch the checkpoint was saved after: Lightning goes straight on to the next one."""
        if self._overdue:
            self._end_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the loss.

        Raises:
            RuntimeError: under manual optimization, ``training_step`` returned none.
        """
        loss = outputs.get("loss")
        if loss is None:
            if pl_module.automatic_optimization:
                return  # a step that training_step skipped
            name = type(pl_module).__name__
            raise RuntimeError(f"{name}.training_step returned no loss: return it, for PreLoRACallback to read")
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # which Lightning has divided it by
        self._loss = self._loss + loss.detach().double()
        self._batches += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch, unless it was cut short, as by ``max_steps``, or ended before this resume."""
        if self._batches and trainer.is_last_batch:
            self._end_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last epoch when the checkpoint was saved after its last batch: nothing else of it is left."""
        if self._overdue:
            self._end_epoch(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add PreLoRA's state: tensors and plain values; on every rank, as Lightning's own part."""
        if self.pre is not None:
            checkpoint[KEY] = {
                "state": self.pre.state_dict(),
                # Of every rank: only one writes the file.
                "epoch": distributed.gather_json([float(self._loss), self._batches]),
                "epoch_complete": self._batches > 0 and trainer.is_last_batch,
            }

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make ready for a checkpoint that is saved now: a step may be under way, and LoRA's ramp on the rates."""
        if self.pre is not None:
            self.pre.abandon_step()

    @property
    def _started(self) -> PreLoRA:
        assert self.pre is not None
        return self.pre

    def _end_epoch(self, trainer: Trainer) -> None:
        event = self.event = self._started.end_epoch(self._loss / self._batches)
        self._begin_epoch()
        if event.action != "none":
            self._install(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(_numbers(self._started, event), step=trainer.global_step)

    def _install(self, trainer: Trainer) -> None:
        """Give the Trainer the rebuilt optimizer and scheduler, and wrap the changed module in DDP again."""
        trainer.optimizers = [self._started.optimizer]
        for config in trainer.lr_scheduler_configs:
            config.scheduler = self._started.scheduler
        trainer.strategy.model = distributed.rewrap(_wrapped(trainer))


def _wrapped(trainer: Trainer) -> nn.Module:
    """The LightningModule, in DDP if there are ranks."""
    assert trainer.strategy.model is not None
    return trainer.strategy.model


def _check_trainer(trainer: Trainer) -> None:
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise TypeError(
            f"PreLoRACallback under {type(trainer.strategy).__name__}: accepted are one device and strategy='ddp'; "
            f"for a sharded model use prelora's trainer (--distributed.strategy fsdp) or PreLoRA in your own loop"
        )
    precision = type(trainer.precision_plugin).__name__
    if precision in REFUSED_PRECISIONS:
        raise TypeError(f"PreLoRACallback under {precision}, which replaces nn.Linear: use precision='bf16-mixed'")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for cls in type(callback).__mro__:
            if cls.__name__ in REFUSED_CALLBACKS:
                raise TypeError(f"{type(callback).__name__} beside PreLoRACallback {REFUSED_CALLBACKS[cls.__name__]}")


def _check_wrapper(model: nn.Module, pl_module: LightningModule) -> None:
    distributed.unwrap(model)
    if getattr(model, "static_graph", False) and not pl_module.automatic_optimization:
        # Lightning starts the first reduction of a static graph by hand, once: the second DDP's would not come.
        raise TypeError("PreLoRACallback with static_graph=True under manual optimization: leave static_graph out")


def _only_optimizer(trainer: Trainer) -> tuple[Any, Any]:
    """The optimizer, and its scheduler or None."""
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    if len(optimizers) != 1:
        raise OptimizerError(f"configure_optimizers gave {len(optimizers)} optimizers: give one, with parameter groups")
    if len(schedulers) > 1:
        raise OptimizerError(f"configure_optimizers gave {len(schedulers)} schedulers: chain them, as by SequentialLR")
    return optimizers[0], schedulers[0] if schedulers else None


def _member(pl_module: LightningModule, argument: str, member: str | Callable[[LightningModule], Any]) -> Any:
    if callable(member):
        return member(pl_module)
    try:
        return operator.attrgetter(member)(pl_module)
    except AttributeError:
        names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise AttributeError(
            f"{type(pl_module).__name__} has no {member!r}: give PreLoRACallback({argument}=...); its modules: {names}"
        ) from None


def _merge(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave of every LoRALinear what a plain Linear with its function has."""
    for path, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            state[f"{prefix}{path}.weight"] = layer.merged_weight()
            for part in ("lora_A", "lora_B"):
                state.pop(f"{prefix}{path}.{part}", None)


def _make_room(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Have a plain state dict, as ``_merge`` leaves it, load into layers that have trained: their own update ends."""
    for path, layer in module.named_modules():
        if isinstance(layer, LoRALinear) and f"{prefix}{path}.lora_B" not in state:
            nn.init.zeros_(layer.lora_B)


def _numbers(pre: PreLoRA, event: Event) -> dict[str, float]:
    return {
        f"{KEY}/phase": PHASES.index(event.phase),
        f"{KEY}/loss": event.loss,
        f"{KEY}/trainable_share": event.trainable_share,
        **{
            f"{KEY}/norm/{group}": fmean(event.norms.effective[target.name] for target in members)
            for group, members in by_group(pre.targets).items()
        },
    }
