"""How many CPU cores this process may use: of the machine's those that its affinity mask and its CPU quota leave it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Environment variables by which numerical libraries start no threads when they are imported: processes that fork.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores of this process's affinity mask, or its quota where that is less, rounded up; at least 1.

    The least quota counts of its own cgroup and of all above it, as containers, SLURM and systemd set them: `cpu.max`
    (version 2) or `cpu.cfs_quota_us` (version 1).
    """
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """The quotas in force, in cores."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = GROUPS / "cpu" if controllers else GROUPS
        # A container's own group may be named as the host sees it: what is not found here is passed over.
        for part in ("", *Path(group).parts[1:]):
            folder /= part
            quota, period = _version_1(folder) if controllers else _version_2(folder)
            if quota.isdigit() and int(quota):  # not "max", not -1
                yield int(quota) / int(period)


def _version_2(folder: Path) -> list[str]:
    file = folder / "cpu.max"
    return file.read_text().split() if file.exists() else ["max", ""]


def _version_1(folder: Path) -> list[str]:
    files = [folder / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    return [file.read_text().strip() for file in files] if files[0].exists() else ["-1", ""]
