// The engine in plain C++, for any processor.
#include "block.h"
#include "vector_generic.h"

namespace prelora::cpu {

const Engine* generic_engine() {
  static const Engine engine{"generic", [] { return true; }, run_block<Generic>};
  return &engine;
}

}  // namespace prelora::cpu
