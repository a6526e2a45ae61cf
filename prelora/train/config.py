"""The trainer's configuration: frozen dataclasses, read from and written to YAML."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite
import yaml

from prelora.config import PreLoRAConfig
from prelora.data import imagenet
from prelora.data.source import LoaderName, SourceName
from prelora.files import replace_text
from prelora.precision import Precision

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained; a size that is None is the model's own."""

    library: Literal["timm", "transformers"] = "timm"
    """timm builds its model of the name; transformers builds ViTForImageClassification from the sizes."""
    name: str = "vit_tiny_patch16_224"
    """timm's model name."""
    image_size: int = 224
    """Side in pixels."""
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from and how they are changed."""

    name: SourceName = "digits"
    path: Path | None = None
    """For images: a directory with train and val as class folders, tars (WebDataset) or TFRecords; for idx: one with
    the four files of MNIST or Fashion-MNIST."""
    batch_size: int = 64
    """Images per rank and micro-batch."""
    epochs_per_pass: int = 1
    """Epochs in one pass over the training images: above 1, PreLoRA looks oftener than a large set is passed."""
    workers: int = 0
    """For images: DALI's threads, or the plain loader's processes, per rank."""
    loader: LoaderName = "auto"
    """For images: auto takes DALI where it runs; an explicit choice that cannot serve is an error."""
    max_quarantined: int = 32
    """For images: files per rank that may turn out unusable before the run ends."""
    rand_augment: tuple[int, float] | None = None
    """For images: operations and magnitude, on AugReg's scale."""
    mixup: float = 0.0
    """Beta distribution's parameter; 0: no mixup."""
    cutmix: float = 0.0
    """Beta distribution's parameter; 0: no cutmix."""
    label_smoothing: float = 0.0
    classes: int = imagenet.CLASSES
    """For synthetic: how many it pretends to have, as in the next two."""
    train_samples: int = imagenet.TRAIN_IMAGES
    eval_samples: int = imagenet.EVAL_IMAGES


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer (by timm's name) and schedule: linear warm-up, then cosine, then if asked a cooldown, by step."""

    name: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 0.0
    """Where the cosine ends."""
    weight_decay: float = 0.05
    """On matrices only; biases, norms and LoRA have none."""
    warmup_epochs: int = 0
    """Epochs of the learning rate's linear warm-up."""
    schedule_epochs: int | None = None
    """Epochs after which the cosine ends; None: the run's."""
    cooldown_epochs: int = 0
    """Epochs at the run's end in which the rate goes linearly from the cosine's to ``min_lr``."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None: not clipped."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several ranks share the work."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: a whole replica on each; fsdp: weights, gradients and moments sharded over all of them (FSDP2)."""
    compress: Literal["none", "bf16"] = "none"
    """bf16: for ddp, gradients travel in bf16."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often checkpoints are written and which stay; the best by top-1 always does."""

    every_steps: int | None = None
    """Also within an epoch, every so many optimizer steps; None: at the end of an epoch only."""
    every_epochs: int = 1
    """At the end of every so many epochs; of the last, the switch's and the freeze's always."""
    keep_last: int = 2
    """How many of the newest stay."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete run."""

    recipe: str = "digits"
    """The recipe to start from."""
    output: Path = Path("runs/digits")
    """The run's folder."""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the output's newest valid checkpoint, if there is one."""
    method: Literal["prelora", "full"] = "prelora"
    """full: the baseline, monitored alike but never switched."""
    epochs: int = 30
    eval_every: int = 1
    """Evaluate after every so many epochs, and after the last."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "fp32"
    """fp32, or autocast to bf16 or (with loss scaling) fp16; the weights are fp32 always."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = True
    """Only deterministic algorithms; an operator without one is an error."""
    on_nan: Literal["stop", "skip"] = "stop"
    """On a loss that is not finite: stop the run, or skip that optimizer step on all ranks."""
    ema_decay: float | None = None
    """Decay of the weights' exponential moving average (timm's ModelEmaV3); None: no average."""
    targets: Literal["family", "paper"] = "family"
    """Six module groups, or the paper's five."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl; wandb and mlflow are set up by their own environment variables."""
    prelora: PreLoRAConfig = field(default_factory=PreLoRAConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for names, accepted, holds in _RANGES:
            for name in names:
                value = operator.attrgetter(name)(self)
                if value is not None and not (math.isfinite(value) and holds(value)):
                    raise ValueError(f"{name} = {value}: must be {accepted if math.isfinite(value) else 'finite'}")
        if len(set(self.loggers)) < len(self.loggers):
            raise ValueError(f"loggers = {' '.join(self.loggers)}: each at most once")
        if self.optim.warmup_epochs >= self.epochs:
            raise ValueError(f"optim.warmup_epochs = {self.optim.warmup_epochs}: must be below epochs = {self.epochs}")
        if self.optim.warmup_epochs + self.optim.cooldown_epochs > self.epochs:
            raise ValueError(
                f"optim.cooldown_epochs = {self.optim.cooldown_epochs}: must leave epochs = {self.epochs} for "
                f"optim.warmup_epochs = {self.optim.warmup_epochs}"
            )
        if self.optim.min_lr > self.optim.lr:
            raise ValueError(f"optim.min_lr = {self.optim.min_lr}: must be at most optim.lr = {self.optim.lr}")
        if self.distributed.strategy == "fsdp" and self.distributed.compress != "none":
            raise ValueError(f"distributed.compress = {self.distributed.compress}: must be none with strategy fsdp")


_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (
        (
            "epochs",
            "eval_every",
            "model.image_size",
            "model.patch_size",
            "model.embed_dim",
            "model.depth",
            "model.num_heads",
            "data.batch_size",
            "data.epochs_per_pass",
            "optim.lr",
            "optim.clip_grad",
            "optim.schedule_epochs",
            "optim.accumulate",
            "checkpoint.every_steps",
            "checkpoint.every_epochs",
            "checkpoint.keep_last",
        ),
        "above 0",
        lambda value: value > 0,
    ),
    (
        (
            "data.workers",
            "data.max_quarantined",
            "data.mixup",
            "data.cutmix",
            "optim.min_lr",
            "optim.weight_decay",
            "optim.warmup_epochs",
            "optim.cooldown_epochs",
        ),
        "at least 0",
        lambda value: value >= 0,
    ),
    (
        ("model.drop_rate", "model.drop_path_rate", "data.label_smoothing"),
        "in [0, 1)",
        lambda value: 0 <= value < 1,
    ),
    (("ema_decay",), "in (0, 1)", lambda value: 0 < value < 1),
    (("seed",), "from 0 to below 2^32", lambda value: 0 <= value < 2**32),
)
"""Fields, what is accepted in them, and whether a value is; None, where a field takes it, is."""


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values only, as YAML and JSON take them."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The config with these values, defaults elsewhere.

    Raises:
        ValueError: an unknown key (the nearest known one is suggested), or a value out of range.
        TypeError: a value of the wrong type.
    """
    _refuse_unknown(values, TrainConfig, "")
    hooks: dict[type, Callable[[Any], Any]] = {Path: _to_path, float: _to_float, int: _to_int}
    try:
        return dacite.from_dict(TrainConfig, values, dacite.Config(strict=True, cast=[tuple], type_hooks=hooks))
    except dacite.WrongTypeError as error:
        kind = error.field_type
        accepted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise TypeError(f"{error.field_path} = {error.value!r}: must be {accepted}") from None


def load_yaml(path: Path) -> TrainConfig:
    """A config file, as ``save_yaml`` or a user's hand wrote it.

    Raises:
        ValueError, TypeError: as ``from_dict``; also for a file that is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, expected a mapping")
    return from_dict(values)


def save_yaml(config: TrainConfig, path: Path) -> None:
    """Replace ``path`` by every value, in the order of the dataclasses, or leave it as it was."""
    replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _to_float(value: Any) -> float:
    # YAML reads 1 as an integer and 1e-3 as a string.
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    raise dacite.WrongTypeError(float, value)


def _to_int(value: Any) -> int:
    if isinstance(value, bool):  # which is an integer to Python
        raise dacite.WrongTypeError(int, value)
    return value


def _to_path(value: Any) -> Path:
    if isinstance(value, (str, Path)):
        return Path(value)
    raise dacite.WrongTypeError(Path, value)


def _refuse_unknown(values: dict[str, Any], kind: type, prefix: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(fields)}"
            raise ValueError(f"unknown key {prefix}{key}: {hint}")
        factory = fields[key].default_factory
        if isinstance(value, dict) and dataclasses.is_dataclass(factory):
            _refuse_unknown(value, factory, f"{prefix}{key}.")
