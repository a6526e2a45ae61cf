// The engine in AVX-512.
#define PRELORA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#define PRELORA_ENGINE avx512_engine
#define PRELORA_NAME "avx512"
#define PRELORA_VECTOR Avx512
#define PRELORA_VECTOR_HEADER "vector_avx512.h"
#define PRELORA_AVAILABLE \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && \
  __builtin_cpu_supports("bmi2")
#include "isa_x86.h"
