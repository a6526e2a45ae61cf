"""``prelora export --to merged``: the stock model's own state dict, checked by loading and comparing it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prelora import surgery
from prelora.files import replacing
from prelora.train.export import load_trained


def export_merged(
    run: Path, out: Path | None = None, *, checkpoint: Path | None = None, use_best: bool = False, ema: bool = False
) -> tuple[Path, float]:
    """Write the merged model as safetensors.

    The file is loaded into a stock timm or transformers model with ``strict=True``, and that model's logits are
    held against the run's on random images, before it takes its place.

    Args:
        run: as for ``load_trained``, like ``checkpoint``, ``use_best`` and ``ema``.
        out: the file; None: ``<run>/export/merged.safetensors`` (``merged_ema`` for the average).

    Returns:
        The file, and the largest difference of the logits relative to their largest.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ValueError: there is no EMA, or the merged model's logits differ.
        OSError: the file cannot be written; there is none then.
    """
    trained = load_trained(run, checkpoint=checkpoint, use_best=use_best, ema=ema)
    merged = surgery.merged_state_dict(trained.model)
    out = out or run / "export" / f"merged{'_ema' if ema else ''}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(out) as part:
            save_file({name: tensor.contiguous() for name, tensor in merged.items()}, part, metadata=trained.about())
            stock = trained.stock()
            stock.load_state_dict(load_file(part), strict=True)
            difference = trained.check(stock, "merged")
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {out}: {error}") from error
    return out, difference
