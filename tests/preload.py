"""What the process imports from which the tests' commands are forked; its numba threads are not started.

GNU OpenMP does not survive a fork, and FFCV's import starts numba's threads, by setting how many there are.
"""
# ruff: noqa: E402

import numba

set_num_threads = numba.set_num_threads
numba.set_num_threads = lambda count: None
import ffcv_fields  # noqa: F401
import ffcv.pipeline.compiler

import scenes.demo  # noqa: F401

numba.set_num_threads = ffcv.pipeline.compiler.set_num_threads = set_num_threads
