// The instruction set that every CPU of the architecture has: SSE2 on x86-64, NEON on AArch64.
#include "includes.h"

#define BN_VECTOR_BYTES 16
#if defined(__aarch64__)
#define BN_FUSED_MULTIPLY_ADD 1
#else
#define BN_FUSED_MULTIPLY_ADD 0
#endif
namespace torch_bn::cpu {
namespace {
#include "vector.inl"
#include "registers.inl"
#include "loops.inl"
#include "rows.inl"
#include "activations.inl"
#include "mask.inl"
#include "runs.inl"
#include "moments.inl"
#include "gradients.inl"
#include "maps.inl"
#include "mapping.inl"
#include "joining.inl"
#include "folding.inl"
#include "finish.inl"
#include "passes.inl"
#include "sharing.inl"
#include "schedule.inl"
#include "kernels.inl"
}  // namespace
const Kernels baseline{"baseline", workspace_bytes, mask_bytes, forward, inference, backward, update};
}  // namespace torch_bn::cpu
