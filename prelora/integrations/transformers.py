"""``PreLoRATrainer``: transformers' ``Trainer`` through all three phases."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_NAME

from prelora import distributed, optim, surgery
from prelora.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from prelora.config import PreLoRAConfig
from prelora.errors import CheckpointError, OptimizerError, PreLoRAWarning
from prelora.events import Event
from prelora.integrations.accelerate import STATE, AcceleratedPreLoRA, check_accelerator
from prelora.targets import Layout, Target, find_targets
from prelora.units import PHASES

if not hasattr(Trainer, "_run_epoch"):
    raise ImportError("prelora.integrations.transformers needs the Trainer of transformers >= 5.4")

TRAINER_STATE = "trainer_state.json"
OPTIMIZERS = (
    OptimizerNames.ADAMW_TORCH,
    OptimizerNames.ADAMW_TORCH_FUSED,
    OptimizerNames.SGD,
    OptimizerNames.ADAGRAD,
    OptimizerNames.RMSPROP,
    OptimizerNames.ADAFACTOR,
)
"""Those of ``TrainingArguments.optim`` that keep plain tensors for each parameter."""


class PreLoRATrainer(Trainer):
    """``Trainer`` that ends every epoch with PreLoRA's turn: it may inject LoRA or freeze the base, inside ``train()``.

    It subclasses ``Trainer`` instead of calling ``train()`` once per phase: each call would begin and end the run for
    every callback and logger, load the best model, and need a checkpoint on disk in between, while inside one call no
    more has to be exchanged than the model that each epoch is started with.

    A checkpoint's folder holds the merged model (``config.json``, ``model.safetensors``: loadable by
    ``from_pretrained``, as what ``save_model`` writes) and, in place of ``optimizer.pt`` and ``scheduler.pt``,
    ``prelora/`` with everything to resume from, weights before merging included.

    Args:
        model: plain, not wrapped; or ``model_init``.
        prelora_config: None: the defaults (the paper's Exp2).
        targets: where LoRA goes, as in ``prelora.PreLoRA``.
        others: as in ``Trainer``.

    Raises:
        TargetError, OptimizerError, TypeError, ValueError: the model or an argument cannot go through the switch; the
            message says what can.
    """

    model: nn.Module

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        *others: Any,
        prelora_config: PreLoRAConfig | None = None,
        targets: Layout | Sequence[Target] | str | None = None,
        **named: Any,
    ) -> None:
        if model is not None:
            _check_model(model)
        super().__init__(model, *others, **named)
        if model is None:
            _check_model(self.model)
        _check_arguments(self)
        find_targets(self.model, targets)
        self.prelora_config = prelora_config or PreLoRAConfig()
        self.targets = targets
        self.pre: AcceleratedPreLoRA | None = None
        """The controller, from the beginning of ``train()`` on."""
        self.events: list[Event] = []
        """What each epoch's end found and did, in this process."""
        self._resumed_from: Path | None = None
        self._losses = _EpochLosses(self.args.device)
        # First, so that every other callback sees what a switch has left.
        self.callback_handler.callbacks.insert(0, _Turns(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **named: Any) -> TrainOutput:
        """As ``Trainer.train``; ``True`` resumes from the newest intact checkpoint, and warns of those passed over.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another run.
            RuntimeError: this trainer has trained already.
        """
        if self.pre is not None and self.model_init is None:
            raise RuntimeError(
                "train() was called before, and the model may carry LoRA by now: build a new PreLoRATrainer around a "
                "new model (resume_from_checkpoint goes on from a checkpoint), or give model_init instead of model"
            )
        self.pre, self._resumed_from, self.events = None, None, []
        if getattr(self.model, "_is_accelerate_prepared", False):
            # An evaluation prepared it, without DDP, and a second prepare() would do nothing.
            self.model_wrapped = self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            del self.model._is_accelerate_prepared
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest_intact(Path(self.args.output_dir)) or True
        return super().train(resume_from_checkpoint, *others, **named)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in ``Trainer``, but of the optimizer inside accelerate's wrapper: the one that a switch rebuilds."""
        if optimizer is None:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, *others: Any, **named: Any) -> Tensor:
        """As in ``Trainer``; the loss is added to the epoch's."""
        loss = super().training_step(model, *others, **named)
        self._losses.add(loss)
        return loss

    def _begin(self, max_steps: int) -> None:
        """Build the controller around what ``accelerator.prepare`` returned; of a resumed run, load its state."""
        self.pre = AcceleratedPreLoRA(
            self.accelerator,
            self.model_wrapped,
            self.optimizer,
            self.prelora_config,
            scheduler=self.lr_scheduler,
            targets=self.targets,
            total_steps=max_steps,
            seed=self.args.seed,
        )
        self._losses = _EpochLosses(self.args.device)
        if self._resumed_from is not None:
            tree = load_checkpoint(self._resumed_from / STATE)
            self.pre.load_state_dict(tree)
            self._losses.load_state_dict(tree["losses"])
        self._adopt()

    def _end_epoch(self) -> None:
        assert self.pre is not None
        event = self.pre.end_epoch(self._losses.mean())
        self._losses = _EpochLosses(self.args.device)
        self._adopt()
        self.events.append(event)
        self.log(_scalars(event))

    def _adopt(self) -> None:
        """Put what PreLoRA holds now where ``Trainer`` and the callbacks look for it."""
        assert self.pre is not None
        self.model_wrapped = self.pre.model
        self.lr_scheduler = self.callback_handler.lr_scheduler = self.pre.scheduler

    def _run_epoch(self, **named: Any) -> None:
        # The loop's own variable still names the DDP that a switch, or a resume, has replaced.
        super()._run_epoch(**named | {"model": self.model_wrapped})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is None and self.pre is not None and self.args.should_save:
            state_dict = self.pre.merged_state_dict()
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.pre is not None
        losses = self._losses.state_dict()
        if self.args.should_save:
            pre = self.pre
            about = {"phase": pre.phase, "epoch": pre.epoch, "step": pre.step}
            save_checkpoint(Path(output_dir) / STATE, pre.state_dict() | {"losses": losses}, about)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json, by which a checkpoint counts as complete, must not come before another rank's file.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        if not (path / STATE).is_dir():
            raise CheckpointError(
                f"{path} holds no {STATE}/: accepted is a checkpoint that PreLoRATrainer saved without "
                f"save_only_model; to start anew from its weights, load the model with from_pretrained"
            )
        verify_checkpoint(path / STATE)
        self._resumed_from = path

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Nothing: they are loaded once the saved phase's structure stands."""

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        path = Path(self.state.best_model_checkpoint)
        surgery.strip(self.model)  # what was saved is merged; an A and B that stayed would be added to it
        self.model.load_state_dict(_saved_weights(self.model, path), strict=True)


class _EpochLosses:
    """This rank's losses in the epoch under way."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._pending = torch.zeros_like(self._sum)

    def add(self, loss: Tensor) -> None:
        """A micro-batch's share of its step's loss; without waiting for the device."""
        self._pending += loss.to(self._pending)

    def end_step(self) -> None:
        """The micro-batches so far made up a step; a checkpoint saved before it repeats them."""
        self._sum += self._pending
        self._pending.zero_()
        self.steps += 1

    def mean(self) -> float:
        """Mean over the steps."""
        return self._sum.item() / self.steps

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sum, gathered; to be called on all."""
        return {"sums": distributed.gather_json(self._sum.item()), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up this rank's own sum."""
        self._sum += distributed.own_share(state["sums"])
        self.steps = state["steps"]


class _Turns(TrainerCallback):
    """Calls the trainer where an epoch begins and ends."""

    def __init__(self, trainer: PreLoRATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._begin(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._losses.end_step()
        # At the last step, not after it: a checkpoint that is due with this step then holds the epoch's end, too.
        if float(state.epoch or 0).is_integer():
            self.trainer._end_epoch()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A callback may have ended the epoch early; what max_steps cuts off is no epoch.
        if self.trainer._losses.steps and not control.should_training_stop:
            self.trainer._end_epoch()


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    if distributed.unwrap(model) is not model:
        raise TypeError(f"model is a {name}: pass the plain model; the Trainer wraps it, and torch_compile compiles it")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"{name} carries PEFT adapters, and PreLoRA places LoRA itself: merge them first (merge_and_unload) and "
            f"pass the plain model"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise TypeError(f"{name} is quantised, and PreLoRA trains every weight at first: load it without quantization")
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise TypeError(f"{name} was sharded as it was loaded: load it without distributed_config, tp_plan, device_map")


def _check_arguments(trainer: PreLoRATrainer) -> None:
    args = trainer.args
    if args.fsdp:
        raise TypeError(
            "fsdp is not supported through the Trainer: use DDP (torchrun), or prelora's own trainer "
            "(python -m prelora.train --distributed.strategy fsdp)"
        )
    check_accelerator(trainer.accelerator)
    if args.n_gpu > 1:
        raise TypeError(
            f"{args.n_gpu} GPUs in one process would be DataParallel, which is not supported: start one process per "
            f"GPU (torchrun --nproc-per-node={args.n_gpu}), or show it one (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size starts over with a model that may carry LoRA: set the batch size")
    if args.enable_jit_checkpoint and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "enable_jit_checkpoint has each rank stop by itself, perhaps at another step: accepted is one process; "
            "with several, save_strategy='steps'"
        )
    if trainer.train_dataset is not None and not has_length(trainer.train_dataset):
        raise ValueError(
            f"train_dataset is a {type(trainer.train_dataset).__name__} without a length; PreLoRA counts epochs: "
            f"accepted is a dataset with __len__"
        )
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    if optimizer is not None:
        optim.check_rebuildable(optimizer)
        if scheduler is not None:
            optim.check_schedulable(scheduler, optimizer)
    elif trainer.optimizer_cls_and_kwargs is None and args.optim not in OPTIMIZERS:
        raise OptimizerError(
            f"optim = {OptimizerNames(args.optim).value!r} cannot be rebuilt around LoRA; accepted are "
            f"{', '.join(name.value for name in OPTIMIZERS)}, or your own: optimizers=(optimizer, None)"
        )
    if scheduler is None and args.lr_scheduler_type == "greedy":
        raise OptimizerError("lr_scheduler_type = 'greedy' cannot be carried over a switch; accepted are all others")


def _scalars(event: Event) -> dict[str, float]:
    """An event as numbers, which every logger takes."""
    scalars = {
        "prelora_phase": float(PHASES.index(event.phase)),
        "prelora_loss": event.loss,
        "prelora_trainable_share": event.trainable_share,
    }
    if event.ranks:
        ranks = list(event.ranks.values())
        scalars |= {
            "prelora_rank_min": float(min(ranks)),
            "prelora_rank_mean": sum(ranks) / len(ranks),
            "prelora_rank_max": float(max(ranks)),
        }
    return scalars


def _newest_intact(output: Path) -> str | None:
    """The newest checkpoint under ``output`` that is whole, as rank 0 finds it; None if there is none at all.

    Raises:
        CheckpointError: all are damaged.
    """
    chosen, faults = None, []
    if distributed.rank() == 0:
        matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output.glob("checkpoint-*")]
        for _, path in sorted(((int(match[1]), path) for match, path in matches if match), reverse=True):
            if (fault := _fault(path)) is None:
                chosen = str(path)
                break
            faults.append(fault)
    chosen, faults = distributed.broadcast_json([chosen, faults])
    if chosen is None and faults:
        raise CheckpointError(f"no intact checkpoint under {output}: {'; '.join(faults)}")
    for fault in faults:
        warnings.warn(f"passed over a damaged checkpoint for {chosen}: {fault}", PreLoRAWarning, stacklevel=3)
    return chosen


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; ``trainer_state.json`` is what is written last."""
    try:
        verify_checkpoint(path / STATE)
        json.loads((path / TRAINER_STATE).read_text())
    except (CheckpointError, OSError, ValueError) as error:
        return f"{path.name}: {error}"
    return None


def _saved_weights(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by the model's names; on the disk a model may have the names of its past."""
    if not isinstance(model, PreTrainedModel):
        return safetensors.torch.load_file(path / SAFE_WEIGHTS_NAME)
    saved, found = type(model).from_pretrained(path, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        raise CheckpointError(f"{path} is not of this model: {found}")
    return saved.state_dict()
