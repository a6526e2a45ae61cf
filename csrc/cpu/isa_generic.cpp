// The engine in plain C++, for any processor.
#include "adapter_block.h"
#include "block.h"
#include "vector_generic.h"

namespace prelora::cpu {

const Engine* generic_engine() {
  static const Engine engine{"generic", [] { return true; }, run_block<Generic>, run_adapter_block<Generic>,
                             pack_adapter<Generic>};
  return &engine;
}

}  // namespace prelora::cpu
