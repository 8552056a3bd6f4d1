// The steps for any processor.

#include "steps.h"

const Steps steps_portable = {is_plain, crop_jpeg, crop_pixels};
