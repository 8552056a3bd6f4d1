// What pooling.cu needs to compile as plain C++: a block is one thread, and `run` loops over the blocks.
#include <cmath>
#include <cstring>
#define __global__
#define __shared__
#define __restrict__
#define DEVICE static inline
struct Dim { unsigned x; };
static Dim blockIdx, threadIdx, blockDim = {1};
static void __syncthreads() {}
float shared[1 << 16];
using std::fabs;
DEVICE float float_from_bits(int bits) { float f; std::memcpy(&f, &bits, 4); return f; }
DEVICE unsigned bits_from_float(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
DEVICE float float_from_half(unsigned short bits) { _Float16 h; std::memcpy(&h, &bits, 2); return (float)h; }
DEVICE unsigned short half_from_float(float f) { _Float16 h = (_Float16)f; unsigned short b; std::memcpy(&b, &h, 2); return b; }
DEVICE float not_a_number() { return NAN; }
DEVICE float add_to(float *address, float value) { return *address += value; }
