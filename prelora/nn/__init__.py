"""Modules, each thin over one operator."""

from prelora.nn.linear import LoRALinear
from prelora.nn.merging import merge_once

__all__ = ["LoRALinear", "merge_once"]
