// From the fields of a weight, known at run time, to template arguments.
#pragma once

#include <intrinsics.cuh>

#include "weight.h"

namespace quantlab {

// Calls visit.template operator()<T, BITS, CODEBOOK>() for a tiled weight.
template <typename Visit>
int visit_tiled(const Weight& weight, Visit visit) {
  const auto by_codebook = [&]<typename T, int BITS>() {
    switch (static_cast<Codebook>(weight.codebook)) {
      case Codebook::kPerRow:
        return visit.template operator()<T, BITS, Codebook::kPerRow>();
      case Codebook::kPerGroup:
        return visit.template operator()<T, BITS, Codebook::kPerGroup>();
      case Codebook::kUniform:
        return visit.template operator()<T, BITS, Codebook::kUniform>();
      default:
        return kUnsupported;
    }
  };
  const auto by_bits = [&]<typename T>() {
    switch (weight.bits) {
      case 2:
        return by_codebook.template operator()<T, 2>();
      case 3:
        return by_codebook.template operator()<T, 3>();
      case 4:
        return by_codebook.template operator()<T, 4>();
      default:
        return kUnsupported;
    }
  };
  switch (static_cast<Element>(weight.element)) {
    case Element::kFloat16:
      return by_bits.template operator()<__half>();
    case Element::kBfloat16:
      return by_bits.template operator()<__nv_bfloat16>();
    default:
      return kUnsupported;
  }
}

}  // namespace quantlab
