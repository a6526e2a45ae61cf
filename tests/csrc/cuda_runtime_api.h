// What `#include <cuda_runtime_api.h>` finds when a .cu is compiled for a CPU.
#pragma once
#include "host_cuda.h"
