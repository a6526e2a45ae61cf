// Where the kernels' machine comes from: CUDA under nvcc, a CPU under a C++ compiler (tests/csrc/host_cuda.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "device.h"
#define PRELORA_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#else
#include "host_cuda.h"
#endif
