// Which instruction set is used.
#include "engine.h"

#include <atomic>
#include <cstring>

#include "isa.h"

namespace prelora::cpu {
namespace {

std::atomic<const Engine*>& chosen() {
  static std::atomic<const Engine*> best{[] {
    for (const Engine* candidate : {avx512_engine(), avx2_engine()}) {
      if (candidate && candidate->available()) return candidate;
    }
    return generic_engine();
  }()};
  return best;
}

}  // namespace

const Engine* engine() { return chosen(); }

const char* isa() { return chosen().load()->name; }

bool set_isa(const char* name) {
  for (const Engine* candidate : {avx512_engine(), avx2_engine(), generic_engine()}) {
    if (!candidate || std::strcmp(candidate->name, name) != 0 || !candidate->available()) continue;
    chosen() = candidate;
    return true;
  }
  return false;
}

}  // namespace prelora::cpu
