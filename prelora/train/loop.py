"""The training loop: epochs of steps around ``PreLoRA``, resumable after any step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prelora import distributed
from prelora.analysis.plan import ModelFlops, planned_execution
from prelora.checkpoint import (
    CheckpointError,
    checkpoint_path,
    load_checkpoint,
    newest_valid,
    prune,
    set_aside_newer,
)
from prelora.controller import Event, logits, parameter_counts
from prelora.data.sampler import train_batches
from prelora.nn import merge_once
from prelora.precision import autocast
from prelora.sharded_checkpoint import save_together
from prelora.train import accounting, memory, run_dir
from prelora.train.build import Parts, run_facts
from prelora.train.config import TrainConfig, save_yaml, to_dict
from prelora.train.display import Display
from prelora.train.evaluate import evaluate
from prelora.train.peak import measure_peak
from prelora.train.resume import check_resumable, rank_share, restore_rank_share
from prelora.train.rng import seed_all
from prelora.train.stop import Stopper, StopRequested
from prelora.train.timing import PARTS, StepClock

PROBE_IMAGES = 16


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite, and the run was told to stop then."""


@dataclass
class Progress:
    """Where a run stands; plain values, saved with every checkpoint."""

    epoch: int = 0
    """Epochs trained."""
    step: int = 0
    """Steps done of the epoch under way."""
    loss_sum: float = 0.0
    skipped: int = 0
    """Steps of the epoch under way left out for a loss that was not finite."""
    seconds: float = 0.0
    """Time spent in steps of the epoch under way."""
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """The same by part of the step."""
    gradient_bytes: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    """Files that could not be used on any rank, and why."""
    pending: dict[str, Any] | None = None
    """Record of an epoch that is trained but not evaluated yet."""


class Trainer:
    """Runs a config from wherever its checkpoints stand to its last epoch."""

    def __init__(self, config: TrainConfig, parts: Parts, flops: ModelFlops, stopper: Stopper) -> None:
        self.config = config
        self.parts = parts
        self.pre = parts.pre
        self.flops = flops
        self.stopper = stopper
        self.progress = Progress()
        self.scaler = torch.amp.GradScaler(parts.device.type, enabled=config.precision == "fp16")
        self.checkpoints = config.output / run_dir.CHECKPOINTS
        self.resumed_from: Path | None = None
        self.main = distributed.rank() == 0
        self.clock = StepClock(parts.device)
        self.peak = measure_peak(parts.device, config.precision)
        seed_all(config.seed + distributed.rank())

    def run(self) -> None:
        """Train to the end.

        Raises:
            StopRequested: a signal came; a checkpoint to go on from was written.
            NonFiniteLossError: as configured by ``on_nan``.
            CheckpointError: a checkpoint could not be written or read.
        """
        self._resume()
        log = None
        if self.main:
            save_yaml(self.config, self.config.output / run_dir.CONFIG)  # not before a resume has accepted it
            facts = run_facts(self.config, self.parts, self.flops, self.peak)
            run_dir.write_json(self.config.output / run_dir.RUN, facts)
            written = self.progress.epoch - (self.progress.pending is not None)
            log = run_dir.MetricsLog(self.config, facts, written)
        self.display = Display(self.config.epochs, self.parts.steps_per_epoch, enabled=self.main)
        self.display.start_run(self.parts.source.loader)
        done = False
        try:
            while self.progress.epoch < self.config.epochs or self.progress.pending is not None:
                if self.progress.pending is None:
                    self._train_epoch()
                self._finish_epoch(log)
            done = True
        except StopRequested:
            self._save()
            raise
        finally:
            self.display.close()
            if log is not None:
                log.close(done)
        self.display.end_run(self.pre.phase, self.config.method, self.config.output)

    def _train_epoch(self) -> None:
        """Steps from wherever the epoch stands to its end, then PreLoRA's turn."""
        config, progress, parts = self.config, self.progress, self.parts
        memory.reset_peak(parts.device)
        self.pre.model.train()
        indices = train_batches(
            parts.source.train_samples,
            config.seed,
            progress.epoch,
            batch_size=config.data.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            first=progress.step * config.optim.accumulate,
            count=parts.steps_per_epoch * config.optim.accumulate,
            epochs_per_pass=config.data.epochs_per_pass,
        )
        batches = parts.source.train(list(indices), progress.epoch)
        self.display.start_epoch(progress.epoch + 1, self.pre.phase, progress.step)
        while progress.step < parts.steps_per_epoch:
            began = time.perf_counter()
            stop = self._step(batches)
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            self._take_parts()
            self.display.step(progress.loss_sum / progress.step, self._images(), progress.seconds)
            every = config.checkpoint.every_steps
            if progress.step == parts.steps_per_epoch:
                break  # whoever wants to stop is heard before the evaluation, after PreLoRA's turn
            if stop:
                raise StopRequested(self.stopper.signal or "a signal on another rank")
            if every is not None and progress.step % every == 0:
                self._save()
        self.display.close()  # what PreLoRA warns of stands on lines of its own
        self._end_epoch()

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> bool:
        """One optimizer step over the accumulated micro-batches; returns whether the ranks agreed to stop after it."""
        config, pre, clock = self.config, self.pre, self.clock
        clock.start()
        pre.scheduler.step_update(self._global_step())
        total = torch.zeros((), device=self.parts.device)
        with contextlib.ExitStack() as merged:
            with self._autocast():
                merged.enter_context(merge_once(pre.base_model))
            clock.mark("forward")
            for micro in range(config.optim.accumulate):
                last = micro == config.optim.accumulate - 1
                batch = next(batches)
                clock.mark("data")
                with contextlib.nullcontext() if last else distributed.no_sync(pre.model):
                    loss = self._loss(*batch) / config.optim.accumulate
                    clock.mark("forward")
                    clock.mark_when_computed(loss, "backward")
                    self.scaler.scale(loss).backward()
                    clock.mark("communication")
                total += loss.detach()
        stop, finite = self.stopper.agree(torch.isfinite(total))
        self.progress.loss_sum += total.item()
        clock.mark("communication")
        if finite:
            self._update()
        elif config.on_nan == "stop":
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {self.progress.epoch + 1}, step {self.progress.step + 1}; "
                f"the weights were not updated with it. --on-nan skip leaves such steps out"
            )
        else:
            self.progress.skipped += 1
        pre.optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")
        return stop

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = (tensor.to(self.parts.device, non_blocking=True) for tensor in (images, labels))
        targets = labels
        if self.parts.mix is not None:
            images, targets = self.parts.mix(images, labels, self._global_step())
        with self._autocast():
            return self.parts.criterion(logits(self.pre.model(images)), targets)

    def _update(self) -> None:
        config, pre = self.config, self.pre
        pre.finish_gradients()
        self.clock.mark("backward")
        self.progress.gradient_bytes = memory.gradient_bytes(pre.optimizer)
        if config.optim.clip_grad is not None:
            self.scaler.unscale_(pre.optimizer)
            trained = [p for group in pre.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, config.optim.clip_grad)
        self.scaler.step(pre.optimizer)
        self.scaler.update()
        if pre.ema is not None:
            pre.ema.update(pre.base_model)

    def _end_epoch(self) -> None:
        """Let PreLoRA look at the epoch, and turn the progress into its record."""
        progress, pre, phase = self.progress, self.pre, self.pre.phase
        with self._autocast():
            trained_with = memory.memory_by_item(pre, progress.gradient_bytes)
        trainable, _ = parameter_counts(pre.base_model)
        flops = self._flops_per_image()
        lr = pre.optimizer.param_groups[0]["lr"]
        peak = memory.peak_bytes(self.parts.device)
        measured = accounting.rates(
            images=self._images(),
            seconds=progress.seconds,
            parts=progress.parts,
            flops_per_image=flops,
            peak=self.peak,
        )
        communicated = accounting.communication(
            pre.model,
            compressed=self.config.distributed.compress == "bf16",
            accumulate=self.config.optim.accumulate,
        )
        probe = self._probe if "full" in pre.group_phases.values() else None
        event = pre.end_epoch(progress.loss_sum / self.parts.steps_per_epoch, probe=probe)
        progress.pending = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.parts.steps_per_epoch,
            "phase": phase,
            "loss": event.loss,
            "lr": float(lr),
            "images": self._images(),
            **measured,
            "flops_per_image": flops,
            "communication": communicated,
            "peak_memory_bytes": peak,
            "memory": trained_with,
            "trainable": trainable,
            "norms": event.norms.effective,
            "base_norms": event.norms.base,
            "lora_norms": event.norms.lora,
            "update": event.norms.update,
            "skipped_steps": progress.skipped,
            "event": self._event(event),
        }
        self.progress = Progress(epoch=progress.epoch + 1, quarantined=progress.quarantined, pending=progress.pending)

    def _event(self, event: Event) -> dict[str, Any]:
        names = (
            "phase", "action", "reason", "norm_changes", "loss_changes", "update_ranks", "ranks", "released",
            "trainable_share",
        )  # fmt: skip
        groups = {"switched_groups": list(event.switched_groups), "frozen_groups": list(event.frozen_groups)}
        # Every phase's FLOPs are known once every target has its rank.
        flops = self._flops_by_phase(event.ranks) if len(event.ranks) == len(self.pre.targets) else None
        return {**{name: getattr(event, name) for name in names}, **groups, "plan_flops": flops}

    def _flops_by_phase(self, ranks: dict[str, int]) -> dict[str, float]:
        train_lora_a = self.config.prelora.train_lora_a
        return self.flops.phases(ranks, planned_execution(self.config.prelora), train_lora_a).as_dict()

    def _flops_per_image(self) -> float:
        """Of the epoch under way."""
        pre, config = self.pre, self.config.prelora
        phases = pre.group_phases
        if len(set(phases.values())) > 1:
            by_target = {target.name: phases[target.group] for target in pre.targets}
            return self.flops.mixture(by_target, pre.ranks, planned_execution(config), config.train_lora_a)
        return self._flops_by_phase(pre.ranks)[pre.phase] if pre.ranks else self.flops.full

    def _take_parts(self) -> None:
        for part, seconds in self.clock.take().items():
            self.progress.parts[part] += seconds

    def _finish_epoch(self, log: run_dir.MetricsLog | None) -> None:
        """Evaluate, write the record, write the checkpoint."""
        record = self.progress.pending
        assert record is not None
        finished = self.progress.epoch
        last = finished == self.config.epochs
        evaluated = last or finished % self.config.eval_every == 0
        record["eval"] = self._evaluate(self.pre.base_model) if evaluated else None
        averaged = self.pre.ema.module if self.pre.ema is not None and evaluated else None
        record["ema_eval"] = self._evaluate(averaged) if averaged is not None else None
        self.progress.pending = None
        for met in distributed.gather_json(dict(self.parts.source.quarantined)):
            self.progress.quarantined |= met
        record["quarantined"] = dict(sorted(self.progress.quarantined.items()))
        if log is not None:
            log.write(record)
        self.display.end_epoch(record)
        if last or record["event"]["action"] != "none" or finished % self.config.checkpoint.every_epochs == 0:
            self._save(metric=record["eval"]["top1"] if evaluated else None)
        self.stopper.check()

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        return evaluate(
            model,
            self.parts.source,
            batch_size=self.config.data.batch_size,
            device=self.parts.device,
            autocast=self._autocast,
            between=self.stopper.check,
            image_size=self.config.model.image_size,
        )

    @functools.cached_property
    def _probe(self) -> Tensor:
        """A few real images, on which the switch is held to leave the logits as they are; loaded once."""
        indices = torch.arange(min(PROBE_IMAGES, self.parts.source.eval_samples)).numpy()
        images, _ = next(self.parts.source.evaluate([indices]))
        return images.to(self.parts.device)

    def _images(self) -> int:
        return self.progress.step * self.parts.global_batch

    def _global_step(self) -> int:
        return self.progress.epoch * self.parts.steps_per_epoch + self.progress.step

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.parts.device.type, self.config.precision)

    def _save(self, metric: float | None = None) -> None:
        """Write a checkpoint; all ranks fail alike."""
        progress = self.progress
        path = checkpoint_path(self.checkpoints, self._global_step(), progress.pending is not None)
        if path == self.resumed_from:
            return  # stopped again before a step was done
        ranks = distributed.gather_json(rank_share(progress.loss_sum))
        tree = {
            **self.pre.state_dict(),
            "train": {
                "config": to_dict(self.config),
                "world_size": distributed.world_size(),
                "progress": dataclasses.asdict(progress),
                "scaler": self.scaler.state_dict(),
                "ranks": ranks,
            },
        }
        about = {"epoch": progress.epoch, "step": self._global_step(), "phase": self.pre.phase, "metric": metric}
        verified = save_together(path, tree, about)
        failure = None
        if self.main:
            try:
                prune(self.checkpoints, self.config.checkpoint.keep_last, verified)
            except CheckpointError as error:
                failure = str(error)
        failure = distributed.broadcast_json(failure)
        if failure is not None:
            raise CheckpointError(failure)

    def _resume(self) -> None:
        """Go on from the newest valid checkpoint, if resuming and there is one."""
        path, faults = newest_valid(self.checkpoints) if self.main and self.config.resume == "auto" else (None, [])
        chosen, faults = distributed.broadcast_json([str(path) if path else None, faults])
        if self.main:
            for fault in faults:
                print(f"resume: passed over a damaged checkpoint: {fault}", flush=True)
        if chosen is None:
            if faults:
                raise CheckpointError(f"no checkpoint under {self.checkpoints} is intact; remove it to start anew")
            return
        tree = load_checkpoint(Path(chosen))
        saved = tree["train"]
        check_resumable(saved, to_dict(self.config))
        self.pre.load_state_dict(tree)
        self.resumed_from = Path(chosen)
        self.progress = Progress(**saved["progress"])
        self.scaler.load_state_dict(saved["scaler"])
        # Each rank's own: the mean over ranks is taken at the epoch's end.
        self.progress.loss_sum = restore_rank_share(saved, self.config.seed, self._global_step())
        if self.main:
            for aside in set_aside_newer(self.checkpoints, Path(chosen)):
                print(f"resume: the damaged checkpoint is kept as {aside}", flush=True)
            where = f"epoch {self.progress.epoch}, step {self.progress.step}, phase {self.pre.phase}"
            print(f"resume: going on from {chosen} ({where})", flush=True)
