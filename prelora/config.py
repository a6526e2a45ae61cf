"""``PreLoRAConfig``: every hyperparameter of the algorithm, frozen and validated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Freeze = Literal["targets", "all"]
Aggregate = Literal["mean", "mean_abs"]
Window = Literal["mean", "last"]
Normalize = Literal["minmax", "quantile"]
Assignment = Literal["change", "uniform", "reversed", "none"]
Execution = Literal["auto", "merged", "two_path"]
Criterion = Literal["norm", "update_rank"]
LoRAInit = Literal["kaiming", "window_update"]
Switch = Literal["together", "per_group"]

PAPER_THRESHOLDS = {"exp1": (1.00, 5.00), "exp2": (0.50, 2.50), "exp3": (0.25, 1.00)}


def check_execution(execution: str, dropout: float, name: str) -> None:
    """Refuse an unknown execution, and merged execution with dropout; ``name`` is what the dropout is called."""
    if execution not in get_args(Execution):
        raise ValueError(f"execution = {execution!r}: accepted are {', '.join(get_args(Execution))}")
    if execution == "merged" and dropout > 0:
        raise ValueError(
            f"execution = 'merged' with {name} = {dropout}: dropout gives the low-rank path an input of its own, "
            f"accepted are 'auto' and 'two_path'"
        )


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, 8, …"""
    return value >= 1 and value & (value - 1) == 0


@dataclass(frozen=True, kw_only=True)
class PreLoRAConfig:
    """Hyperparameters of PreLoRA; the defaults are the paper's Exp2 with w = 10, but for ``lora_lr_mult``.

    Raises:
        ValueError: a value lies outside what is accepted; the message names both.
        TypeError: a value is of the wrong type.
    """

    k: int = 3
    """Windows compared by the convergence test (Algorithm 1); at least 2."""
    m: int = 3
    """Epochs per window (Algorithm 1); at least 1."""
    tau: float = 0.5
    """Largest change of a group's weight norm between windows, in percent (Algorithm 1, line 7)."""
    zeta: float = 2.5
    """Largest change of the training loss between windows, in percent (Algorithm 1, line 7)."""
    r_min: int = 8
    """Smallest rank (Algorithm 2); a power of two."""
    r_max: int = 64
    """Largest rank (Algorithm 2); a power of two, at least ``r_min``."""
    switch: Switch = "together"
    """Switch all groups once every one passes the test, or each group once it and the loss pass; ``warmup_epochs``,
    ``min_epoch`` and ``deadline`` then hold for each. Groups that share a Linear (q, k and v of timm's fused
    ``attn.qkv``) switch as one, once all of them pass."""
    warmup_epochs: int = 10
    """Epochs w in which base and LoRA train together before the base is frozen (section 3.3)."""
    freeze: Freeze = "targets"
    """What is frozen after the warm-up: the targets' weights and biases, or all but LoRA."""
    criterion: Criterion = "norm"
    """What must have settled beside the loss: the weight norms (Algorithm 1), or the rank of the windows' changes."""
    update_rank_max: float = 8.0
    """Largest stable rank of a window's weight change, mean over a group's layers, with criterion "update_rank"."""
    aggregate: Aggregate = "mean"
    """Norm change of a group: change of the layers' mean norm, or mean of the layers' absolute changes."""
    window: Window = "mean"
    """What stands for a window: the mean of its epochs, or its last epoch."""
    monitor_from: int = 0
    """Finished epochs before monitoring starts: the length of the learning rate's warm-up."""
    min_epoch: int = 0
    """The test cannot pass before this many epochs are finished."""
    deadline: int | None = None
    """Switch once this many epochs are finished, whatever the test says; None: never force it."""
    normalize: Normalize = "minmax"
    """How a group's changes become v in [0, 1] (Algorithm 2, line 10): min-max, or by quantile."""
    assignment: Assignment = "change"
    """Which layer gets which rank: Algorithm 2's, or a control to hold it against. ``uniform``: the same rank
    everywhere, ``reversed``: Algorithm 2's ranks dealt out the other way round in each group, both with as many
    parameters; ``none``: no LoRA, the base is frozen as it stands."""
    budget: float | None = None
    """Largest trainable share of the parameters in the LORA phase, in (0, 1]; None: as the ranks fall."""
    alpha: float | None = None
    """LoRA's scaling is alpha / rank; None: alpha = rank of each layer, so the scaling is 1."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input, in [0, 1)."""
    lora_lr_mult: float = 4.0
    """LoRA's learning rate over that of the weight it adapts: 1 is the paper's, 4 was better on each of
    ``docs/results.md``'s seeds."""
    lora_init: LoRAInit = "kaiming"
    """What A starts from: a Kaiming-uniform draw, or the directions in which the weights still moved last."""
    train_lora_a: bool = True
    """Whether A trains on after the freeze; without it (LoRA-FA), layers keep no input activations."""
    execution: Execution = "auto"
    """How LoRA is computed: merged into the weight, as a second path, or per layer as costs less."""
    log_updates: bool = True
    """Log each epoch's relative update norm, at the price of a copy of the targets' weights."""

    def __post_init__(self) -> None:
        for name, low in [("k", 2), ("m", 1), ("warmup_epochs", 0), ("monitor_from", 0), ("min_epoch", 0)]:
            _check_int(name, getattr(self, name), low)
        for name in ("tau", "zeta", "lora_lr_mult"):
            _check_positive(name, getattr(self, name))
        for name in ("r_min", "r_max"):
            _check_int(name, getattr(self, name), 1)
            if not is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)}: must be a power of two (1, 2, 4, 8, …)")
        if self.r_min > self.r_max:
            raise ValueError(f"r_min = {self.r_min} > r_max = {self.r_max}: r_min must be at most r_max")
        if self.deadline is not None:
            _check_int("deadline", self.deadline, 1)
            if self.deadline < max(self.min_epoch, self.monitor_from + 2):
                raise ValueError(
                    f"deadline = {self.deadline}: must be at least min_epoch = {self.min_epoch} and leave two "
                    f"monitored epochs after monitor_from = {self.monitor_from}, from which ranks are computed"
                )
        _check_number("update_rank_max", self.update_rank_max, "of at least 1")
        if not math.isfinite(self.update_rank_max) or self.update_rank_max < 1:
            raise ValueError(f"update_rank_max = {self.update_rank_max}: a rank, must be finite and at least 1")
        if self.alpha is not None:
            _check_positive("alpha", self.alpha)
        if self.budget is not None:
            _check_number("budget", self.budget, "in (0, 1]")
            if not 0 < self.budget <= 1:
                raise ValueError(f"budget = {self.budget}: a share of the parameters, accepted in (0, 1]")
        _check_number("lora_dropout", self.lora_dropout, "in [0, 1)")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout = {self.lora_dropout}: accepted in [0, 1)")
        for name in ("train_lora_a", "log_updates"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} = {getattr(self, name)!r}: accepted are True, False")
        check_execution(self.execution, self.lora_dropout, "lora_dropout")
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} = {getattr(self, name)!r}: accepted are {', '.join(accepted)}")
        if self.switch == "per_group" and self.budget is not None:
            raise ValueError(
                f"switch = 'per_group' with budget = {self.budget}: a budget is a share over all layers, whose ranks "
                f"are not known at once; accepted is budget = None"
            )

    @property
    def keeps_windows(self) -> bool:
        """Whether the targets' weights at the last window's end are kept, for their change since."""
        return self.criterion == "update_rank" or self.lora_init == "window_update"

    @classmethod
    def paper(cls, experiment: str = "exp2", **overrides: Any) -> PreLoRAConfig:
        """The paper's setting ``"exp1"``, ``"exp2"`` or ``"exp3"``: Table 1; k = m = 3, ranks 8 to 64, w = 10, one
        learning rate for base and LoRA.

        Raises:
            ValueError: no such experiment.
        """
        if experiment not in PAPER_THRESHOLDS:
            raise ValueError(f"experiment {experiment!r}: accepted are {', '.join(PAPER_THRESHOLDS)}")
        tau, zeta = PAPER_THRESHOLDS[experiment]
        return dataclasses.replace(cls(tau=tau, zeta=zeta, lora_lr_mult=1.0), **overrides)


_CHOICES: dict[str, tuple[str, ...]] = {
    "freeze": get_args(Freeze),
    "criterion": get_args(Criterion),
    "lora_init": get_args(LoRAInit),
    "aggregate": get_args(Aggregate),
    "window": get_args(Window),
    "normalize": get_args(Normalize),
    "assignment": get_args(Assignment),
    "switch": get_args(Switch),
}


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: must be an integer, at least {low}")
    if value < low:
        raise ValueError(f"{name} = {value}: must be at least {low}")


def _check_number(name: str, value: object, accepted: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} = {value!r}: must be a number {accepted}")


def _check_positive(name: str, value: float) -> None:
    _check_number(name, value, "above 0")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} = {value}: must be finite and above 0")
