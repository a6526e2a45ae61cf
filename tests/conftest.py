"""Triton's interpreter, asked for before Triton is first imported; and settings that a test changes and gives back."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def threads():
    """Sets torch's threads; afterwards they are as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_isa():
    """Sets the instruction set of ``prelora._C``; afterwards it is as before."""
    best = torch.ops.prelora_C.isa()
    yield torch.ops.prelora_C.set_isa
    torch.ops.prelora_C.set_isa(best)
