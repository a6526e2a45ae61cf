"""PreLoRA: train at full rank, switch to LoRA at partial convergence, finish on LoRA, get a plain model back."""

from prelora.config import PreLoRAConfig
from prelora.controller import Event, PreLoRA
from prelora.errors import CheckpointError, OptimizerError, PreLoRAWarning, TargetError
from prelora.targets import Target, find_targets, register_targets

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Event",
    "OptimizerError",
    "PreLoRA",
    "PreLoRAConfig",
    "PreLoRAWarning",
    "Target",
    "TargetError",
    "find_targets",
    "register_targets",
]
