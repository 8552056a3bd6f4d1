// What a kernel needs to compile as plain C++ and run on the CPU: a block is that many threads, with a real barrier,
// real atomics, and shuffles that exchange values within a warp. Blocks run one after the other.
#include <pthread.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
#define __global__
#define __shared__
#define __restrict__
#define DEVICE static inline
struct Dim { unsigned x; };
static thread_local Dim blockIdx, threadIdx;
static Dim blockDim;
float shared[1 << 16];
static pthread_barrier_t block_barrier, warp_barriers[32];
static float lanes[1024];
using std::fabs;

static void __syncthreads() { pthread_barrier_wait(&block_barrier); }
DEVICE float __shfl_xor_sync(unsigned, float value, int offset) {
  pthread_barrier_t *warp = &warp_barriers[threadIdx.x / 32];
  lanes[threadIdx.x] = value;
  pthread_barrier_wait(warp);
  float other = lanes[threadIdx.x ^ offset];
  pthread_barrier_wait(warp);
  return other;
}
DEVICE unsigned atomic_add(unsigned *place, unsigned value) { return __atomic_fetch_add(place, value, __ATOMIC_RELAXED); }
DEVICE float float_from_bits(int bits) { float f; std::memcpy(&f, &bits, 4); return f; }
DEVICE unsigned bits_from_float(float f) { unsigned bits; std::memcpy(&bits, &f, 4); return bits; }
DEVICE float float_from_half(unsigned short bits) { _Float16 h; std::memcpy(&h, &bits, 2); return (float)h; }
DEVICE unsigned short half_from_float(float f) { _Float16 h = (_Float16)f; unsigned short b; std::memcpy(&b, &h, 2); return b; }
DEVICE float not_a_number() { return NAN; }

// Launch `kernel` (a function without arguments) on `blocks` blocks of `threads` threads, a multiple of 32.
template <typename Kernel> static void launch(int blocks, int threads, Kernel kernel) {
  blockDim.x = threads;
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (int warp = 0; warp < threads / 32; ++warp) pthread_barrier_init(&warp_barriers[warp], nullptr, 32);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([=] {
      threadIdx.x = i;
      for (int block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        kernel();
        __syncthreads();  // shared memory is the next block's
      }
    });
  for (auto &thread : running) thread.join();
}
