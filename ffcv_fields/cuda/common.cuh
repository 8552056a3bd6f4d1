// What the kernels share: the few instructions that a plain C++ compiler lacks, the type of the output, and a reduction.
//   OUT_BYTES  4: float32, 2: float16 or bfloat16 (OUT_BFLOAT16)
// With HOST_SHIM a kernel compiles as C++: a block's threads are threads of the CPU, one block after the other.

#ifdef HOST_SHIM
#include "host_shim.h"
#else
#define DEVICE __device__ __forceinline__
DEVICE float float_from_half(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE unsigned short half_from_float(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
DEVICE float float_from_bits(int bits) { return __int_as_float(bits); }
DEVICE unsigned bits_from_float(float value) { return __float_as_uint(value); }
DEVICE unsigned atomic_add(unsigned *place, unsigned value) { return atomicAdd(place, value); }
#endif

#if OUT_BYTES == 4
typedef float OUT_T;
DEVICE OUT_T to_output(float value) { return value; }
#elif defined(OUT_BFLOAT16)
typedef unsigned short OUT_T;
DEVICE OUT_T to_output(float value) {  // round to nearest even
  unsigned bits = bits_from_float(value);
  if (value != value) return 0x7fff;
  return (OUT_T)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
typedef unsigned short OUT_T;
DEVICE OUT_T to_output(float value) { return half_from_float(value); }
#endif

// Sum or maximum over the block, of whole warps; `scratch` holds 32 floats. Every thread gets the result.
DEVICE float block_reduce(float value, bool maximum, float *scratch) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    float other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = maximum ? fmaxf(value, other) : value + other;
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  value = scratch[0];
  for (int warp = 1; warp < (int)(blockDim.x >> 5); ++warp)
    value = maximum ? fmaxf(value, scratch[warp]) : value + scratch[warp];
  return value;
}
