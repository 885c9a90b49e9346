// Activations that the last map applies, and their derivatives, for scalars and for vectors of scalars.
#pragma once
#include "portable.h"

namespace torch_bn {

/// NB: z < 0 ? 0 : z, so that NaN passes, as in torch.
template <typename V>
BN_INLINE V relu(V z) {
  return z < V{} ? V{} : z;
}

/// dy where z > 0 or z is NaN; the derivative at 0 is 0, as in torch.
template <typename V>
BN_INLINE V relu_gradient(V z, V dy) {
  return z <= V{} ? V{} : dy;
}

}  // namespace torch_bn
