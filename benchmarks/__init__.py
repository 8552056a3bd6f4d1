"""Speed and memory as ratios against named peers; one command each."""

import relabel  # noqa: F401 - as in the commands, OpenMP's settings before torch is imported
