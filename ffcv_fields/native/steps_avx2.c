// The steps for x86-64 with AVX2 and BMI2, which crop_decode.c asks for before it calls them.

#include "crop.h"

#if defined(HAS_AVX2_STEPS)

#define WITH_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi2,fma")
#endif

#include "steps.h"

const Steps steps_avx2 = {is_plain, crop_jpeg, crop_pixels};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
