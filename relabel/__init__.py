"""What the commands share; `data`, `label_maps`, `training` and `evaluation` each have a package."""

import ffcv_fields  # noqa: F401 - before FFCV, which modules here import

__version__ = "0.2.0"
