"""``lora_linear``: one layer, forward, backward and both, against every way that others compute it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench.layers import layer_variants
from bench.precision import DEVICE, PRECISIONS
from prelora.ops.cases import TOKENS_PER_IMAGE, WIDTHS, LinearCase, vit_layers

OPERATORS = ("lora_linear", "lora_merge", "lora_two_path")
RANKS = (8, 16, 32, 64)
UNEQUAL = (64, 8, 16)
"""Ranks of q, k and v."""
IMAGES = {"cpu": (1, 8), "cuda": (8, 64, 256)}[DEVICE.type]
"""``TOKENS_PER_IMAGE`` tokens each."""
USUAL = IMAGES[1]
SECONDS = 15.0
DEFAULT = {
    ("ViT-S", "qkv", (16,) * 3),
    ("ViT-S", "mlp_out", (32,)),
    ("ViT-B", "mlp_in", (32,)),
    ("ViT-L", "qkv", UNEQUAL),
    ("ViT-L", "attn_out", (8,)),
}
"""Model, module and ranks; measured in both precisions at the usual number of tokens."""


def cases() -> Iterator[tuple[str, str, int, LinearCase]]:
    """Model, module, images and case, over all models, modules, ranks and tokens."""
    for model, width in WIDTHS.items():
        for images in IMAGES:
            for rank in RANKS:
                layers = vit_layers(model, rank, images)
                tokens = layers["qkv"].tokens
                # One adapter over the fused weight, as PEFT has it, beside one for each of q, k and v.
                layers["qkv_fused"] = LinearCase(tokens, width, (3 * width,), (rank,))
                yield from ((model, module, images, case) for module, case in layers.items())
            yield model, "qkv", images, LinearCase(images * TOKENS_PER_IMAGE, width, (width,) * 3, UNEQUAL)


def cells() -> Iterator[Any]:
    """Every cell under its id, the default ones marked."""
    for model, module, images, case in cases():
        ranks = str(case.ranks[0]) if len(set(case.ranks)) == 1 else ".".join(map(str, case.ranks))
        usual = images == USUAL and (model, module, case.ranks) in DEFAULT
        for precision in PRECISIONS:
            name = f"lora_linear-{model}-{module}-r{ranks}-{precision}-m{case.tokens}"
            marks = [pytest.mark.default_cell] if usual else []
            yield pytest.param(case, precision, id=name, marks=marks)


@pytest.mark.parametrize(("case", "precision"), list(cells()))
def bench_lora_linear(case: LinearCase, precision: str, measure: Any, compiled: str | None, request: Any) -> None:
    """One layer and its number of tokens, in one precision."""
    name = request.node.callspec.id.removeprefix("lora_linear-")
    with ExitStack() as opened:
        measure("lora_linear", name, layer_variants(case, precision, compiled, opened), SECONDS)
