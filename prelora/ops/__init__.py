"""What each operator means: one file each."""

from prelora.ops.grouped_gemm import grouped_gemm, grouped_gemm_
from prelora.ops.lora_linear import lora_linear, lora_linear_backward
from prelora.ops.lora_merge import lora_merge, lora_merge_backward
from prelora.ops.lora_two_path import lora_two_path, lora_two_path_backward
from prelora.ops.merged_norms import merged_norms
from prelora.ops.weight_norms import weight_norms

__all__ = [
    "grouped_gemm",
    "grouped_gemm_",
    "lora_linear",
    "lora_linear_backward",
    "lora_merge",
    "lora_merge_backward",
    "lora_two_path",
    "lora_two_path_backward",
    "merged_norms",
    "weight_norms",
]
