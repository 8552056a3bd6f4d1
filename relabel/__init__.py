"""What the commands share: settings, label-map files, packing, loading, models, optimizers, scenes."""

import ffcv_fields  # noqa: F401 - before FFCV, which modules here import: see there
