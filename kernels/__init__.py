"""Triton kernels, one flat file per operator; imported as ``prelora.kernels``."""
