"""``prelora export --to peft``: an adapter for PEFT beside its base, checked by loading and comparing both."""

from __future__ import annotations

import warnings
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from prelora.errors import PreLoRAWarning
from prelora.files import replacing_folder
from prelora.integrations.peft_adapter import BASE, FILES, Adapter, check_loaded, save_adapter
from prelora.train.export import Trained, load_trained


def export_peft(
    run: Path, out: Path | None = None, *, checkpoint: Path | None = None, use_best: bool = False, ema: bool = False
) -> tuple[Path, float, Adapter]:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and ``base.safetensors``.

    The base is loaded into a stock timm or transformers model with ``strict=True``, the adapter onto it by
    ``PeftModel.from_pretrained``; every rank and tensor is held against the run's, and the logits on random images,
    before the folder takes its place. Modules that kept training at the checkpoint are PEFT's ``modules_to_save``.

    Args:
        run: as for ``load_trained``, like ``checkpoint``, ``use_best`` and ``ema``.
        out: the folder; None: ``<run>/export/peft`` (``peft_ema`` for the average). An earlier export there is
            replaced, any other folder is not.

    Returns:
        The folder, the largest difference of the logits relative to their largest, and what was written.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ValueError: there is no LoRA or no EMA in the checkpoint, or what PEFT loads differs.
        OSError: the folder cannot be written, or holds other files; it is as it was then.
    """
    trained = load_trained(run, checkpoint=checkpoint, use_best=use_best, ema=ema)
    names = _trained_names(trained)
    out = out or run / "export" / f"peft{'_ema' if ema else ''}"
    try:
        with replacing_folder(out, FILES) as part:
            adapter = save_adapter(trained.model, part, names, trained.about())
            stock = trained.stock()
            stock.load_state_dict(load_file(part / BASE), strict=True)
            loaded = PeftModel.from_pretrained(stock, str(part))
            check_loaded(loaded, adapter)
            difference = trained.check(loaded, "PEFT's")
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {out}: {error}") from error
    if joint := [path for path in adapter.ranks if f"{path}.weight" in names]:
        warnings.warn(
            f"{trained.checkpoint.name} is of the warm-up: the bases of {len(joint)} layers still trained beside "
            f"their LoRA; they stand in {BASE} as they were then, and PEFT keeps them frozen",
            PreLoRAWarning,
            stacklevel=2,
        )
    return out, difference, adapter


def _trained_names(trained: Trained) -> set[str]:
    """The parameters that were still being trained at the checkpoint, by name.

    Raises:
        ValueError: the checkpoint holds no LoRA.
    """
    ranks = trained.tree["ranks"]
    if not any(ranks.values()):
        why = "the plan gives every layer rank 0" if ranks else f"phase {trained.tree['phase']} has no LoRA yet"
        raise ValueError(
            f"{trained.checkpoint} has no adapter: {why}. Export it --to merged, or give another --checkpoint"
        )
    return {name for group in trained.tree["optimizer"]["groups"] for name in group["params"]}
