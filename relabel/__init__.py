"""What the commands share; `data`, `label_maps`, `training` and `evaluation` each have a package."""

import os

__version__ = "0.2.0"

if "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP reads it when torch is imported: its threads wait for each other awake for some 20 microseconds, not
    # 3 ms, before they sleep. Where cores have other work too, who waits awake takes the time of who works.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
