// The one macro of the shared mathematics: callable from host and device, and always inlined with internal
// linkage, so that no copy compiled for one instruction set can be linked into another.
#pragma once
#if defined(__CUDACC__)
#define BN_INLINE static __host__ __device__ __forceinline__
#else
#define BN_INLINE static inline __attribute__((always_inline))
#endif
