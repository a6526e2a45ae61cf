// The engine in AVX2.
#define PRELORA_TARGET "avx2,fma,f16c"
#define PRELORA_ENGINE avx2_engine
#define PRELORA_NAME "avx2"
#define PRELORA_VECTOR Avx2
#define PRELORA_VECTOR_HEADER "vector_avx2.h"
#define PRELORA_AVAILABLE __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
#include "isa_x86.h"
