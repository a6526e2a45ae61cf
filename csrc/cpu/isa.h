// The instruction set that all products on the CPU run on.
#pragma once

namespace prelora::cpu {

// What the products run on: "avx512", "avx2" or "generic"; the best that this processor has unless set.
const char* isa();

// Makes later calls run on the named one; false, and nothing changed, where this processor or build lacks it.
bool set_isa(const char* name);

}  // namespace prelora::cpu
