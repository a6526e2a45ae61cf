// The engine in AVX-512 for products of two bf16 factors.
#define PRELORA_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,avx512bf16"
#define PRELORA_ENGINE avx512_bf16_engine
#define PRELORA_NAME "avx512"
#define PRELORA_VECTOR Avx512Bf16
#define PRELORA_VECTOR_HEADER "vector_avx512_bf16.h"
#define PRELORA_AVAILABLE (avx512_engine()->available() && __builtin_cpu_supports("avx512bf16"))
#include "isa_x86.h"
