"""FFCV's first import, with numba's threads chosen before it and without what makes it slow."""

import numba
import numba.typed

if numba.config.THREADING_LAYER == "default":
    # numba prefers TBB where it finds it, whose layer leaks memory on busy cores (100 KB per epoch of three batches,
    # measured); OpenMP's does not. The third, workqueue, aborts the process when a second thread uses it.
    try:
        import numba.np.ufunc.omppool
    except ImportError as error:
        raise ImportError(f"numba cannot use OpenMP ({error}): install it, e.g. apt-get install libgomp1") from None
    numba.config.THREADING_LAYER = "omp"

# FFCV compiles a numba dictionary of two entries at import, for seconds; no compiled code uses it: a plain one will do.
_typed_dict, numba.typed.Dict = numba.typed.Dict, dict
try:
    import ffcv.fields.rgb_image  # noqa: F401
finally:
    numba.typed.Dict = _typed_dict
