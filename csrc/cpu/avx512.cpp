#if defined(__x86_64__)
#include "includes.h"
#include "target.h"

#define BN_VECTOR_BYTES 64
#define BN_FUSED_MULTIPLY_ADD 1
BN_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
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
const Kernels avx512{"avx512", workspace_bytes, mask_bytes, forward, inference, backward, update};
}  // namespace torch_bn::cpu
BN_TARGET_END
#endif
