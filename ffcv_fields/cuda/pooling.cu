// LabelPooling on the GPU: one block pools one target (CPU twin: _pool_on_cpu in pooling.py).
//
// Compiled by NVRTC with these macros; see pooling.py, and tests/test_pooling_cuda.py for the C++ build.
//   MAP_T      short (bits of float16 scores) or int (bits of float32 scores)
//   OUT_BYTES, OUT_BFLOAT16  see common.cuh
// The logits are summed as 64-bit integers (fixed point), which add to the same bits in whatever order the threads come.
// Contraction of a*b+c must be off (--fmad=false): the number of grid points is ceil(side), and one rounding more
// or less changes it.

#define NO_LABEL_MAP (-2)
#define EMPTY (-1)

#include "common.cuh"

DEVICE float score_from_bits(short bits) { return float_from_half((unsigned short)bits); }
DEVICE float score_from_bits(int bits) { return float_from_bits(bits); }

// Weight of place `at` along one axis for one of the box's `parts`: roi_align's average over ceil(side) bilinear
// samples, aligned=False.
DEVICE float axis_weight(float low, float high, int size, int part, int parts, int at) {
  float start = low * (float)size - 0.5f;
  float side = (high * (float)size - 0.5f) - start;
  if (side < 1.0f) side = 1.0f;
  side /= (float)parts;
  start += (float)part * side;
  int points = (int)ceilf(side);
  float weight = 0.0f;
  for (int i = 0; i < points; ++i) {
    float where = start + ((float)i + 0.5f) * side / (float)points;
    if (where < -1.0f || where > (float)size) continue;
    if (where < 0.0f) where = 0.0f;
    int below = (int)where;
    if (below >= size - 1) {
      if (at == size - 1) weight += 1.0f;
    } else {
      float above_share = where - (float)below;
      if (at == below) weight += 1.0f - above_share;
      if (at == below + 1) weight += above_share;
    }
  }
  return weight / (float)points;
}

// Add to a 64-bit integer in two words, low and high, by the 32-bit atomics that shared memory has in hardware: an
// addition that makes the low word wrap carries one into the high word, so that both are exact in the end.
DEVICE void add_to(unsigned *words, long long value) {
  unsigned low = (unsigned)value, high = (unsigned)((unsigned long long)value >> 32);
  unsigned before = atomic_add(words, low);
  if (before + low < before) ++high;
  if (high) atomic_add(words + 1, high);
}

DEVICE long long sum_in(const unsigned *words) {
  return (long long)((unsigned long long)words[1] << 32 | words[0]);
}

extern "C" __global__ void pool_labels(const MAP_T *__restrict__ label_maps, const float *__restrict__ crop_boxes,
                                       const long long *__restrict__ labels, OUT_T *__restrict__ targets,
                                       unsigned *__restrict__ workspace, int num_classes, int top_k, int height,
                                       int width, float inverse_temperature, int softmax, int parts) {
  extern __shared__ float shared[];
  float *weight_y = shared;
  float *weight_x = weight_y + height;
  float *scratch = weight_x + width;
  // The pooled logits, two words a class: in shared memory, or in global memory where they do not fit.
  unsigned *const shared_sums = (unsigned *)(scratch + 32);
  unsigned *const global_sums = workspace + (long long)blockIdx.x * num_classes * 2;
  unsigned *const sums = workspace ? global_sums : shared_sums;

  // A block pools one part of one sample's box: all of it where parts is 1.
  const int sample = blockIdx.x / (parts * parts), row = blockIdx.x / parts % parts, column = blockIdx.x % parts;
  const int places = height * width;
  const MAP_T *scores = label_maps + (long long)sample * 2 * top_k * places;
  const MAP_T *classes = scores + top_k * places;
  const float *box = crop_boxes + (long long)sample * 4;
  OUT_T *target = targets + (long long)blockIdx.x * num_classes;

  if (classes[0] == NO_LABEL_MAP) {  // the single label, or NaN to be seen where there is none
    long long label = labels ? labels[sample] : -1;
    bool known = label >= 0 && label < num_classes;
    for (int c = threadIdx.x; c < num_classes; c += blockDim.x)
      target[c] = to_output(known ? (c == label ? 1.0f : 0.0f) : not_a_number());
    return;
  }
  // A box that is not one would be pooled into nonsense: NaN stops the run at its first loss.
  bool valid = box[0] <= box[2] && box[1] <= box[3] && fabsf(box[0]) <= 16.0f && fabsf(box[1]) <= 16.0f &&
               fabsf(box[2]) <= 16.0f && fabsf(box[3]) <= 16.0f;
  if (!valid) {
    for (int c = threadIdx.x; c < num_classes; c += blockDim.x) target[c] = to_output(not_a_number());
    return;
  }

  for (int c = threadIdx.x; c < num_classes; c += blockDim.x) sums[2 * c] = sums[2 * c + 1] = 0;
  for (int i = threadIdx.x; i < height + width; i += blockDim.x)
    shared[i] = i < height ? axis_weight(box[1], box[3], height, row, parts, i)
                           : axis_weight(box[0], box[2], width, column, parts, i - height);
  // The unit of the sums: 2^-40 of the greatest score's power of 2. No sum overflows, as an axis' weights add up to 1.
  float most = 0.0f;
  for (int i = threadIdx.x; i < top_k * places; i += blockDim.x) {
    float size = fabsf(score_from_bits(scores[i]));
    if (classes[i] >= 0 && !(size <= most)) most = size;
  }
  most = block_reduce(most, true, scratch);  // which is a barrier too: weights and zeros are there
  int exponent = 0;
  frexpf(most, &exponent);
  const double unit = ldexp(1.0, exponent - 40), per_unit = ldexp(1.0, 40 - exponent);

  bool bad = !(most <= 3.4028235e38f);  // not finite: the row becomes NaN
  for (int place = threadIdx.x; place < places && !bad; place += blockDim.x) {
    float weight = weight_y[place / width] * weight_x[place % width];
    if (weight == 0.0f) continue;
    for (int k = 0; k < top_k; ++k) {
      int c = classes[k * places + place];
      if (c >= 0 && c < num_classes) {
        long long value = (long long)((double)(weight * score_from_bits(scores[k * places + place])) * per_unit);
        if (workspace)  // said twice, so that the compiler knows which memory it is
          add_to(global_sums + 2 * c, value);
        else
          add_to(shared_sums + 2 * c, value);
      } else if (c != EMPTY) {
        bad = true;
      }
    }
  }
  __syncthreads();

  // From here on each class's words are its thread's own; the first takes a float.
  float *const logits = (float *)sums;
  float greatest = 0.0f;  // classes that no place names have logit 0, so the maximum is at least that
  for (int c = threadIdx.x; c < num_classes; c += blockDim.x) {
    logits[2 * c] = (float)((double)sum_in(sums + 2 * c) * unit);
    greatest = fmaxf(greatest, logits[2 * c]);
  }
  if (bad) greatest = float_from_bits(0x7f800000);  // infinity: 0 / 0 below, NaN, seen by the loss
  greatest = block_reduce(greatest, true, scratch);
  if (!softmax) {
    for (int c = threadIdx.x; c < num_classes; c += blockDim.x)
      target[c] = to_output(greatest > 3.4028235e38f ? not_a_number() : logits[2 * c]);
    return;
  }
  double own_sum = 0.0;  // thousands of equal terms add up to the last digit, however few threads share them
  for (int c = threadIdx.x; c < num_classes; c += blockDim.x) {
    float e = expf((logits[2 * c] - greatest) * inverse_temperature);
    logits[2 * c] = e;
    own_sum += e;
  }
  float sum = block_reduce((float)own_sum, false, scratch);
  for (int c = threadIdx.x; c < num_classes; c += blockDim.x) target[c] = to_output(logits[2 * c] / sum);
}
