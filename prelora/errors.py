"""The errors and warnings that are prelora's own; everything else raises Python's."""


class PreLoRAWarning(UserWarning):
    """Something was decided for the user, who may want to know: a rank capped, a group without spread."""


class TargetError(ValueError):
    """A target matches no module, more than one, or one that cannot carry LoRA."""


class OptimizerError(TypeError):
    """The optimizer or scheduler cannot be rebuilt around a changed set of parameters."""


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, or of another model, config or version."""


class DataError(RuntimeError):
    """More images than may be left out cannot be used, or an archive is damaged; the message names the file."""


class ProviderError(RuntimeError):
    """The provider asked for cannot serve an operator; the message says why."""
