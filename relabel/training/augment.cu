// Color augmentation and normalization on the GPU, one block per image (on the CPU: _augment_on_cpu in augment.py).
//   OUT_BYTES, OUT_BFLOAT16  see common.cuh
#include "common.cuh"

#define BRIGHTNESS 0
#define CONTRAST 1
#define SATURATION 2

struct Pixel {
  float r, g, b;
};

DEVICE float gray_of(Pixel p) { return 0.299f * p.r + 0.587f * p.g + 0.114f * p.b; }
DEVICE float clamp(float value) { return value < 0.0f ? 0.0f : value > 1.0f ? 1.0f : value; }
DEVICE float blend(float value, float base, float factor) { return clamp(factor * value + (1.0f - factor) * base); }

// One operation: a blend with 0, with the image's mean gray, or with the pixel's gray.
DEVICE Pixel jitter(Pixel p, int operation, const float *factors, float mean_gray) {
  float factor = factors[operation];
  float base = operation == BRIGHTNESS ? 0.0f : operation == CONTRAST ? mean_gray : gray_of(p);
  Pixel result = {blend(p.r, base, factor), blend(p.g, base, factor), blend(p.b, base, factor)};
  return result;
}

DEVICE Pixel read_pixel(const unsigned char *image, int at) {
  const float unit = 1.0f / 255.0f;
  Pixel p = {image[3 * at] * unit, image[3 * at + 1] * unit, image[3 * at + 2] * unit};
  return p;
}

// images uint8 [B, pixels, 3]; draws float [B, 9]: three factors, the order of the three operations, the shift of
// R, G and B; statistics float [6]: mean and 1 / standard deviation; out [B, pixels, 3].
extern "C" __global__ void augment(const unsigned char *__restrict__ images, const float *__restrict__ draws,
                                   const float *__restrict__ statistics, OUT_T *__restrict__ out, int pixels) {
  extern __shared__ float shared[];
  const unsigned char *image = images + (long long)blockIdx.x * pixels * 3;
  OUT_T *target = out + (long long)blockIdx.x * pixels * 3;
  const float *factors = draws + (long long)blockIdx.x * 9, *shift = factors + 6;
  int order[3] = {(int)factors[3], (int)factors[4], (int)factors[5]};

  int before = 0;  // operations before the contrast, which needs the mean gray of what they make
  while (order[before] != CONTRAST) ++before;
  float sum = 0.0f;
  for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
    Pixel p = read_pixel(image, at);
    for (int i = 0; i < before; ++i) p = jitter(p, order[i], factors, 0.0f);
    sum += gray_of(p);
  }
  float mean_gray = block_reduce(sum, false, shared) / (float)pixels;

  for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
    Pixel p = read_pixel(image, at);
    for (int i = 0; i < 3; ++i) p = jitter(p, order[i], factors, mean_gray);
    target[3 * at] = to_output((p.r + shift[0] - statistics[0]) * statistics[3]);
    target[3 * at + 1] = to_output((p.g + shift[1] - statistics[1]) * statistics[4]);
    target[3 * at + 2] = to_output((p.b + shift[2] - statistics[2]) * statistics[5]);
  }
}
