"""Images and labels for the trainer: every source is a ``Source``, every order a function of (seed, epoch)."""

from prelora.data.source import Source, build_source

__all__ = ["Source", "build_source"]
