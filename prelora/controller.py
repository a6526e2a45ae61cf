"""``PreLoRA``: the state machine FULL → WARMUP → LORA around a model and its optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prelora import _ext, distributed, monitor, optim, sharding, shards, surgery, window_update
from prelora.config import PreLoRAConfig
from prelora.errors import OptimizerError, PreLoRAWarning
from prelora.events import Event, action_of
from prelora.monitor import Monitor, Norms
from prelora.nn import LoRALinear
from prelora.nn.deferred_grads import defer_lora_grads, lora_grads_from_weights, lora_grads_pending
from prelora.nn.execution import Choice
from prelora.ramp import LoRARamp, Ramp
from prelora.ranks import assign_ranks
from prelora.state import STATE_VERSION, check_state, own_buffers, saved_clocks, saved_ramps, scheduler_state
from prelora.targets import Layout, Target, base_parameters, find_targets, target_linear, target_shape
from prelora.units import Clocks, Phase, decide, find_units, history


class PreLoRA:
    """Takes a model and its optimizer through full training, joint warm-up and LoRA, inside one process.

    Call ``end_epoch(loss)`` once an epoch on every rank; ``model``, ``optimizer``, ``scheduler`` and ``ema`` are
    current after it. At a switch they may be new objects; the replaced ones raise when used.

    Args:
        model: plain, in DDP or sharded by FSDP2 (``fully_shard`` on its blocks, then on itself), compiled or not.
        optimizer: over the model's parameters.
        config: None: the defaults (the paper's Exp2).
        targets: where LoRA goes, as in ``find_targets``.
        scheduler: a torch or timm LR scheduler of the optimizer, to be carried along.
        ema: an averaged copy of the model with a ``module`` (timm's ``ModelEmaV3``, torch's ``AveragedModel``), to
            be extended with LoRA; of a sharded model, built before ``fully_shard`` and sharded alike.
        total_steps: optimizer steps of the whole run, from which LoRA's LR ramp takes 1 % of what remains at the
            switch, at most 500; None: 1 % of the steps done.
        seed: from which A and the sketches of the weights' changes are drawn.
        defer_lora_grads: in the warm-up, make A's and B's gradients from those of the weights once per optimizer
            step, instead of in every backward; then call ``finish_gradients`` before gradients are clipped.

    Raises:
        TargetError, OptimizerError, TypeError, ValueError: the model, the optimizer, its scheduler, the wrapper or
            the average cannot go through the switch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: PreLoRAConfig | None = None,
        *,
        targets: Layout | Sequence[Target] | str | None = None,
        scheduler: Any = None,
        ema: Any = None,
        total_steps: int | None = None,
        seed: int = 0,
        defer_lora_grads: bool = False,
    ) -> None:
        self.config = config or PreLoRAConfig()
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.ema = ema
        self.total_steps = total_steps
        self.seed = seed
        self.defer_lora_grads = defer_lora_grads
        self.epoch = 0
        """Epochs finished."""
        self.step = 0
        """Optimizer steps taken."""
        self.ranks: dict[str, int] = {}
        """The plan by target, of the groups that have switched."""
        self._reshard()
        self.targets = find_targets(self.base_model, targets)
        sharding.check_sharding(self.base_model, self.targets)
        optim.check_rebuildable(optimizer)
        held = set(optim.parameter_names(optimizer, self.base_model).values())
        if idle := [target.name for target in self.targets if f"{target.path}.weight" not in held]:
            after = ": build it after fully_shard" if sharding.is_sharded(self.base_model) else ""
            raise OptimizerError(f"the optimizer does not hold the weights of {len(idle)} targets, as {idle[0]}{after}")
        if scheduler is not None:
            optim.check_schedulable(scheduler, optimizer)
        averaged = self._averaged
        if averaged is not None and list(averaged.state_dict()) != list(self.base_model.state_dict()):
            raise ValueError("the parameters and buffers of ema.module are not the model's: build ema from the model")
        if averaged is not None and sharding.is_sharded(averaged) != sharding.is_sharded(self.base_model):
            raise ValueError("model or ema.module alone is sharded: build ema, then apply fully_shard to both alike")
        self._clocks = Clocks(find_units(self.targets, self.config.switch))
        self._monitor = Monitor(self.targets, self.config)
        self._ramp = LoRARamp()
        self._hooks: list[Any] = []
        self._finished_step = -1
        self._watch_steps()
        self._snapshot: dict[str, Tensor] | None = None
        self._snapshot_step = 0
        self._take_snapshot()
        self._window_start: dict[str, Tensor] = {}
        self._keep_window_start()

    @property
    def phase(self) -> Phase:
        """``"full"`` until a group switches, ``"lora"`` once the base of all is frozen, ``"warmup"`` in between."""
        return self._clocks.phase

    @property
    def group_phases(self) -> dict[str, Phase]:
        """The phase of each group: with ``switch="per_group"`` they may differ."""
        return self._clocks.phases

    @property
    def switch_epoch(self) -> int | None:
        """Epochs finished when LoRA came into the first group; None before."""
        return min(self._clocks.switch_epochs.values(), default=None)

    @property
    def base_model(self) -> nn.Module:
        """The plain model inside ``model``'s wrappers."""
        return distributed.unwrap(self.model)

    @property
    def _averaged(self) -> nn.Module | None:
        """The plain model that holds the average."""
        return distributed.unwrap(self.ema.module) if self.ema is not None else None

    def _reshard(self) -> None:
        """Have the models hold their sharded parameters, those that the optimizer knows."""
        for model in filter(None, (self.base_model, self._averaged)):
            sharding.reshard(model)

    def end_epoch(self, loss: float | Tensor, probe: Any = None) -> Event:
        """Record an epoch and, when it is time, switch or freeze; on every rank, at the same epoch boundary.

        Args:
            loss: this rank's mean training loss of the epoch, as optimised.
            probe: a batch for the model (a tensor, or a tuple of arguments); given, the logits before and after
                injection are compared on it.

        Raises:
            RuntimeError: the switch did not do what it promises (function, ranks, equality between ranks).
        """
        self._reshard()
        self.abandon_step()
        self.epoch += 1
        mean_loss = distributed.mean_over_ranks(float(loss))
        norms = monitor.measure(self.base_model, self.targets, self._snapshot)
        # Rank 0's numbers and decision are everyone's: a reduction need not round alike on every rank.
        norms = Norms(**distributed.broadcast_json(dataclasses.asdict(norms)))
        if "full" in self.group_phases.values() and self.epoch > self.config.monitor_from:
            self._monitor.record(mean_loss, norms.effective)
        update_ranks = self._window_update_ranks()
        verdict, switching = decide(self._clocks, self._monitor, self.epoch)
        switching = distributed.broadcast_json(switching)
        ranks = distributed.broadcast_json(self._plan(switching) if switching else {})
        self._clocks.mark(self.epoch, switching, [])
        freezing = self._clocks.due(self.epoch, self.config.warmup_epochs)
        self._clocks.mark(self.epoch, [], freezing)
        released: dict[str, int] = {}
        if switching or freezing:
            released = self._operate(switching, freezing, ranks, probe)
            self._settle()
        self._take_snapshot()
        self._keep_window_start()
        trainable, total = parameter_counts(self.base_model)
        return Event(
            epoch=self.epoch,
            phase=self.phase,
            action=action_of(switching, freezing),
            reason=verdict.reason,
            loss=mean_loss,
            norms=norms,
            norm_changes=verdict.norm_changes,
            loss_changes=verdict.loss_changes,
            ranks=dict(self.ranks),
            trainable=trainable,
            trainable_share=trainable / total,
            released=released,
            update_ranks=update_ranks,
            switched_groups=tuple(switching),
            frozen_groups=tuple(freezing),
        )

    def finish_gradients(self) -> None:
        """Make the gradients that ``defer_lora_grads`` put off; after backward and before unscaling or clipping.

        ``optimizer.step`` does so itself where it was not called, and outside of the warm-up there is nothing to do.
        """
        if self._defers:
            self._reshard()
            lora_grads_from_weights(self.base_model)
            self._finished_step = self.step

    @property
    def _defers(self) -> bool:
        return self.defer_lora_grads and self.phase == "warmup"

    def explain(self) -> dict[str, Choice]:
        """How each target's module computed its last input, and why, by path; empty before the switch.

        Under ``torch.compile``, which records nothing, and before the first input, nothing is listed either.
        """
        layers = {target.path: target_linear(self.base_model, target) for target in self.targets}
        return {
            path: layer.last_plan
            for path, layer in layers.items()
            if isinstance(layer, LoRALinear) and layer.last_plan is not None
        }

    def merged_state_dict(self, ema: bool = False) -> dict[str, Tensor]:
        """State dict of the plain timm or transformers model, of the weights or of their average.

        Of a sharded model a collective: called on every rank, it is whole on every one, on the model's device.
        On a CPU, memory that is kept from one step's effective weights for the next one's is given back first.

        Raises:
            ValueError: ``ema`` without one.
        """
        model = self._averaged if ema else self.base_model
        if model is None:
            raise ValueError("merged_state_dict(ema=True): PreLoRA was given no ema")
        _ext.release_memory()
        self._reshard()
        return surgery.merged_state_dict(model)

    def abandon_step(self) -> None:
        """Take LoRA's ramp off the learning rates that an optimizer step which raised has left it on.

        The next step, ``end_epoch``, ``state_dict`` and ``load_state_dict`` do so by themselves: call it before you
        save the optimizer otherwise. Where no step has raised it does nothing.
        """
        self._ramp.after(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from here: nested dicts of tensors (not copied) and plain values.

        Of a sharded model the tensors are DTensors, for ``sharded_checkpoint.save_together``.
        """
        self._reshard()
        self.abandon_step()
        return {
            "version": STATE_VERSION,
            "config": dataclasses.asdict(self.config),
            "targets": [dataclasses.asdict(target) for target in self.targets],
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "switch_epochs": dict(self._clocks.switch_epochs),
            "freeze_epochs": dict(self._clocks.freeze_epochs),
            "seed": self.seed,
            "ranks": dict(self.ranks),
            "ramps": {name: dataclasses.asdict(ramp) for name, ramp in self._ramp.ramps.items()},
            "monitor": self._monitor.state_dict(),
            # At an epoch's end the weights are their own snapshot.
            "snapshot": self._snapshot if self.step != self._snapshot_step else None,
            "window_snapshot": self._window_start or None,
            "model": dict(self.base_model.state_dict()),
            "optimizer": optim.named_state(self.optimizer, self.base_model),
            "scheduler": scheduler_state(self.scheduler) if self.scheduler is not None else None,
            "ema": dict(self._averaged.state_dict()) if self._averaged is not None else None,
            "ema_buffers": own_buffers(self.ema),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rebuild the saved phase's structure, then load; into a PreLoRA built as the saved one was, on every rank.

        How the model was wrapped or sharded, and over how many ranks, may differ: tensors of the state may be whole or
        DTensors, and are laid out anew.

        Raises:
            CheckpointError: the state is of another model, config, optimizer or version; nothing is changed then.
            RuntimeError: this PreLoRA has switched already.
        """
        self._reshard()
        if self.phase != "full":
            raise RuntimeError(f"load_state_dict in phase {self.phase!r}: load into a freshly built PreLoRA")
        check_state(
            state,
            config=self.config,
            targets=self.targets,
            model=self.base_model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ema=self.ema,
        )
        self.abandon_step()
        if self.seed != state["seed"]:
            warnings.warn(f"seed {self.seed} gives way to the saved {state['seed']}", PreLoRAWarning, stacklevel=2)
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]
        self._window_start = {}  # what A starts from at a switch is not asked again: A is in the state
        # In the order of the run, so that groups and parameters stand in the optimizer as they did there.
        for epoch, switching, freezing in history(*saved_clocks(state)):
            self._clocks.mark(epoch, switching, freezing)
            self._operate(switching, freezing, state["ranks"], probe=None)
        if self.phase != "full":
            self._settle()
        self._ramp.ramps = saved_ramps(state, self._ramp.ramps)
        self._monitor.load_state_dict(state["monitor"])
        shards.load(self.base_model, state["model"])
        optim.load_named_state(self.optimizer, self.base_model, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(dict(state["scheduler"]))
        if self._averaged is not None:
            shards.load(self._averaged, state["ema"])
            for name, buffer in own_buffers(self.ema).items():
                buffer.copy_(state["ema_buffers"][name])
        self._take_snapshot()
        if self._snapshot is not None and state["snapshot"] is not None:
            self._snapshot_step = -1
            for path, tensor in self._snapshot.items():
                tensor.copy_(shards.laid_out_like(state["snapshot"][path], tensor))
        parameters = dict(self.base_model.named_parameters())
        for path, saved in (state.get("window_snapshot") or {}).items():
            self._window_start[path] = shards.laid_out_like(saved, parameters[f"{path}.weight"]).clone()
        distributed.check_same_on_all_ranks(self.base_model)

    def _take_snapshot(self) -> None:
        if self.config.log_updates:
            self._snapshot = monitor.take_snapshot(self.base_model, self.targets)
            self._snapshot_step = self.step

    def _keep_window_start(self) -> None:
        """Keep the weights of monitoring's start and of every window's end until the next one's, of groups in FULL."""
        waiting = self._waiting()
        self._window_start = {t.path: self._window_start[t.path] for t in waiting if t.path in self._window_start}
        ended = self.epoch == self.config.monitor_from or self._monitor.window_complete
        if waiting and self.config.keeps_windows and ended:
            self._window_start = monitor.take_snapshot(self.base_model, waiting)

    def _window_update_ranks(self) -> dict[str, float]:
        """Stable rank of the change of each target in FULL over the window that ended now, for the monitor, too."""
        if not self._window_start or not self._monitor.window_complete:
            return {}
        ranks = window_update.update_ranks(
            self.base_model, self._waiting(), self._window_start, seed=self.seed, epoch=self.epoch
        )
        self._monitor.record_update(ranks)
        return ranks

    def _targets_of(self, groups: Collection[str]) -> list[Target]:
        return [target for target in self.targets if target.group in groups]

    def _waiting(self) -> list[Target]:
        """The targets of the groups that have not switched."""
        return self._targets_of([group for group, phase in self.group_phases.items() if phase == "full"])

    def _plan(self, groups: Collection[str]) -> dict[str, int] | None:
        """Algorithm 2 for ``groups``, on rank 0; the others take it by broadcast."""
        if distributed.rank() != 0:
            return None
        model = self.base_model
        shapes = {target.name: target_shape(model, target) for target in self.targets}
        base = base_parameters(self.targets)
        others = [p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in base]
        return assign_ranks(
            self._monitor.changes(groups),
            shapes,
            self.config,
            total_parameters=parameter_counts(model)[1],
            other_trainable=sum(others) if self.config.freeze == "targets" else 0,
        )

    def _operate(
        self, switching: Collection[str], freezing: Collection[str], ranks: Mapping[str, int], probe: Any
    ) -> dict[str, int]:
        """Surgery on the plain model, then optimizer and scheduler anew; returns the bytes released.

        Args:
            switching, freezing: groups, marked as such already.
        """
        model = self.base_model
        added: dict[str, str] = {}
        dropped: list[str] = []
        released: dict[str, int] = {}
        if switching:
            before = _probed(model, probe)
            added = self._inject(model, self._targets_of(switching), ranks)
            after = _probed(model, probe)
            if before is not None and after is not None and not torch.equal(before, after):
                raise RuntimeError(f"injection changed the logits by up to {(after - before).abs().max():.3g}")
            known = {**self.ranks, **ranks}
            self.ranks = {target.name: known[target.name] for target in self._targets_of(self._clocks.switch_epochs)}
        if freezing:
            # What is no target's trains on as long as any target's base does.
            scope = self.config.freeze if self.phase == "lora" else "targets"
            dropped = surgery.freeze(
                model,
                self._targets_of(freezing),
                scope,
                train_lora_a=self.config.train_lora_a,
                without_lora={name for name, rank in self.ranks.items() if rank == 0},
            )
            released = self._released(model, dropped)
            added = {name: weight for name, weight in added.items() if name not in dropped}
        for hook in self._hooks:
            hook.remove()
        self.optimizer, parents = optim.rebuild_optimizer(
            self.optimizer, model, added=added, dropped=dropped, lr_mult=self.config.lora_lr_mult
        )
        if self.scheduler is not None:
            self.scheduler = optim.rebuild_scheduler(self.scheduler, self.optimizer, parents)
        if switching:
            self._ramp.begin(self.optimizer, Ramp.at(self.step, self.total_steps))
        self._watch_steps()
        return released

    def _settle(self) -> None:
        """Hold that the ranks agree after surgery, and wrap the model again."""
        model = self.base_model
        # Before it is wrapped again: DDP's constructor gives every rank the parameters of rank 0, and would hide it.
        distributed.check_same_on_all_ranks(model)
        distributed.check_agreed("the realised ranks", surgery.realised_ranks(model, self.targets))
        deferred = defer_lora_grads(model, self.defer_lora_grads)
        reduced = {name for name, _ in model.named_parameters() if surgery.is_lora(name)} - set(deferred)
        self.model = distributed.rewrap(self.model, unreduced=deferred, reduced=reduced)

    def _inject(self, model: nn.Module, targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, str]:
        def into(model: nn.Module) -> dict[str, str]:
            config = self.config
            device = shards.local(target_linear(model, self.targets[0]).weight).device
            sharded = sharding.is_sharded(model)
            with sharding.taken_apart(model) if sharded else contextlib.nullcontext():
                added = surgery.inject(
                    model,
                    targets,
                    {target.name: ranks[target.name] for target in targets},
                    alpha=config.alpha,
                    dropout=config.lora_dropout,
                    execution=config.execution,
                    seed=self.seed,
                    device=device,
                    initial_a=initial_a,
                )
                if sharded:  # afterwards every rank holds another part, and nothing can be compared
                    distributed.check_same_on_all_ranks(model)
            return added

        initial_a = None
        if self.config.lora_init == "window_update" and self._window_start:
            initial_a = window_update.initial_a(model, targets, ranks, self._window_start, seed=self.seed)
        averaged = self._averaged
        if averaged is not None:
            into(averaged)
            averaged.requires_grad_(False)
        return into(model)

    def _released(self, model: nn.Module, dropped: Sequence[str]) -> dict[str, int]:
        parameters = dict(model.named_parameters())
        state = optim.state_bytes(self.optimizer)
        gradients = sum(shards.local(parameters[name]).nbytes for name in dropped)
        released = {
            "gradients": gradients,
            "optimizer_state": sum(state.get(parameters[name], 0) for name in dropped),
        }
        if distributed.has_gradient_buckets(self.model):
            released["ddp_buckets"] = gradients
        return released

    def _watch_steps(self) -> None:
        def before(optimizer: Optimizer, *_: Any) -> None:
            if self._defers and (self._finished_step != self.step or lora_grads_pending(self.base_model)):
                self.finish_gradients()
            self._ramp.before(optimizer, self.step)

        def after(optimizer: Optimizer, *_: Any) -> None:
            self._ramp.after(optimizer)
            self.step += 1

        self._hooks = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters that train, and parameters of the model without LoRA."""
    named = list(model.named_parameters())
    trainable = sum(parameter.numel() for _, parameter in named if parameter.requires_grad)
    return trainable, sum(parameter.numel() for name, parameter in named if not surgery.is_lora(name))


def logits(output: Any) -> Tensor:
    """The logits in what a timm or transformers model returned."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def _probed(model: nn.Module, probe: Any) -> Tensor | None:
    if probe is None:
        return None
    training = {module: module.training for module in model.modules()}
    output = model.eval()(*(probe if isinstance(probe, tuple) else (probe,)))
    for module, mode in training.items():
        module.training = mode
    sharding.reshard(model)
    return logits(output)
