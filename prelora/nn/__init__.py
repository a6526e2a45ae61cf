"""Modules, each thin over one operator."""

from prelora.nn.linear import LoRALinear

__all__ = ["LoRALinear"]
