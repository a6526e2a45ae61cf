"""PreLoRA on what ``Accelerator.prepare`` returned.

A second ``prepare`` of something that was prepared does nothing, so a switch cannot go through it. ``PreLoRA`` builds
DDP anew around the changed model by itself; accelerate's wrappers of the optimizer and of the scheduler, which the
accelerator holds too, stay the objects that they are and are pointed at the rebuilt ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prelora import distributed
from prelora.checkpoint import load_checkpoint, save_checkpoint
from prelora.config import PreLoRAConfig
from prelora.controller import PreLoRA
from prelora.errors import OptimizerError
from prelora.events import Event

STATE = "prelora"
"""The folder that a checkpoint of accelerate's, or of transformers' Trainer, gets for PreLoRA's state."""


class AcceleratedPreLoRA(PreLoRA):
    """``PreLoRA`` for a model, an optimizer and a scheduler that ``accelerator.prepare`` returned.

    The prepared optimizer and scheduler stay valid over every switch: step those, not ``pre.optimizer``, which is the
    optimizer inside and knows nothing of accumulation. Of the model, ``pre.model`` is current after ``end_epoch``.

    ``accelerator.save_state(folder)`` writes PreLoRA's state, weights included, as ``folder/prelora``, a checkpoint of
    ``prelora.checkpoint``; ``accelerator.load_state(folder)`` rebuilds the saved phase's structure out of it before
    accelerate loads what it keeps itself. Load into an ``AcceleratedPreLoRA`` built as the saved one was.

    Args:
        accelerator: with one process, or several under DDP.
        model: as ``accelerator.prepare`` returned it.
        optimizer: likewise.
        config: as in ``PreLoRA``.
        scheduler: as ``accelerator.prepare`` returned it, or, not prepared, a torch or timm scheduler of the optimizer
            that was given to ``prepare``.
        options: as in ``PreLoRA``.

    Raises:
        TypeError: DeepSpeed, FSDP, Megatron, XLA or model parallelism; a model or optimizer that was not prepared.
        TargetError, OptimizerError, ValueError: as in ``PreLoRA``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        config: PreLoRAConfig | None = None,
        *,
        scheduler: Any = None,
        **options: Any,
    ) -> None:
        check_accelerator(accelerator)
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise OptimizerError(f"{type(optimizer).__name__} was not prepared: give what accelerator.prepare returned")
        if not getattr(model, "_is_accelerate_prepared", False):
            raise TypeError(f"{type(model).__name__} was not prepared: give what accelerator.prepare returned")
        if accelerator.num_processes > 1 and not any(isinstance(m, DistributedDataParallel) for m in model.modules()):
            raise TypeError(
                f"{type(model).__name__} is in no DistributedDataParallel on {accelerator.num_processes} processes: "
                f"prepare() leaves out what was prepared before, as for an evaluation; prepare it for training first"
            )
        self.accelerator = accelerator
        self._prepared_optimizer = optimizer
        self._prepared_scheduler = scheduler if isinstance(scheduler, AcceleratedScheduler) else None
        plain = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
        super().__init__(model, optimizer.optimizer, config, scheduler=plain, **options)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def end_epoch(self, loss: float | Tensor, probe: Any = None) -> Event:
        """As ``PreLoRA.end_epoch``."""
        event = super().end_epoch(loss, probe)
        self._follow()
        return event

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As ``PreLoRA.load_state_dict``."""
        super().load_state_dict(state)
        self._follow()

    def _follow(self) -> None:
        """Point accelerate's wrappers at what there is now."""
        # As unpickling does: with a gradient scaler, the wrapper also keeps the optimizer's own ``step``.
        self._prepared_optimizer.__setstate__({"optimizer": self.optimizer})
        if self._prepared_scheduler is not None:
            self._prepared_scheduler.scheduler = self.scheduler
        # A DDP that is new would be wrapped once more by a later prepare().
        self.model._is_accelerate_prepared = True  # type: ignore[assignment]

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        index = self._index(models)
        if index is None:
            return
        del weights[index]  # they are in the state; merged or stripped of A and B they could not be resumed
        settings = self.accelerator.project_configuration
        each_node = settings.save_on_each_node
        if self.accelerator.is_local_main_process if each_node else self.accelerator.is_main_process:
            save_checkpoint(Path(folder) / STATE, self.state_dict())
        self.accelerator.wait_for_everyone()

    def _load(self, models: list[nn.Module], folder: str) -> None:
        index = self._index(models)
        if index is None:
            return
        del models[index]
        self.load_state_dict(load_checkpoint(Path(folder) / STATE))

    def _index(self, models: list[nn.Module]) -> int | None:
        """Where this run's model stands among the accelerator's; None: it was freed, and another has come."""
        mine = self.base_model
        return next((index for index, model in enumerate(models) if distributed.unwrap(model) is mine), None)


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse an accelerator under which the model, or the optimizer around it, cannot be changed in a run.

    Raises:
        TypeError: with what is accepted.
    """
    kind = accelerator.distributed_type.value
    accepted = "accepted are one process, and several under DDP (torchrun or accelerate launch --multi_gpu)"
    if kind == "FSDP":
        raise TypeError(
            f"FSDP through accelerate is not supported; {accepted}. FSDP2 is, without accelerate: fully_shard the "
            f"model and give it to prelora.PreLoRA, or train with --distributed.strategy fsdp (python -m prelora.train)"
        )
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise TypeError(f"accelerate's {kind} is not supported: its engine owns model and optimizer; {accepted}")
    layout = accelerator.parallelism_config
    if layout is not None and any((layout.tp_enabled, layout.cp_enabled, layout.sp_enabled, layout.dp_shard_enabled)):
        raise TypeError(f"{layout!r} splits the model or its inputs over ranks; {accepted}")
