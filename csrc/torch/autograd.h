// What ops.cpp asks autograd.cpp, which has torch's headers of autograd: they take 2 s to compile.
#pragma once

namespace torch_bn {

/// Whether this thread runs a backward pass now.
bool inside_backward();

}  // namespace torch_bn
