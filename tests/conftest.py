"""Without a GPU, Triton kernels run in Triton's interpreter; that is decided when they are first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
