// The names of the activations, as users and schemas have them.
#pragma once
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

#include "../kernels.h"

namespace torch_bn {

/// In the order of Activation, from its second on.
constexpr std::string_view kActivationNames[] = {"relu", "leaky_relu", "elu",      "silu",
                                                 "gelu", "gelu_tanh",  "hardswish"};

inline Activation activation_of(std::optional<std::string_view> name) {
  int place = 0;
  if (!name) return Activation(place);
  for (const std::string_view known : kActivationNames)
    if (++place; *name == known) return Activation(place);
  TORCH_CHECK_VALUE(false,
                    "batch_norm: activation must be None, 'relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'gelu_tanh' or "
                    "'hardswish', got '", *name, "'");
}

inline std::optional<std::string_view> name_of(Activation activation) {
  if (activation == Activation::none) return std::nullopt;
  return kActivationNames[int(activation) - 1];
}

inline bool has_number(Activation activation) {
  return activation == Activation::leaky_relu || activation == Activation::elu;
}

}  // namespace torch_bn
