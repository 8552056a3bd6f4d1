"""The small-scale study: ImageNet's problem, single labels on images of several objects, on two CPU cores."""

import ffcv_fields  # noqa: F401 - before FFCV, which modules here import
