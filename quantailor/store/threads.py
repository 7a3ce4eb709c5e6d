"""Where threads of our own may run.

With OMP_PROC_BIND the thread that loads OpenMP is bound to one core, and every thread that it starts inherits that:
reading, hashing and building would share the core. OpenMP's places are what the process was allowed before.
"""

import ctypes
import os
from functools import cache


@cache
def allowed_cores() -> frozenset[int]:
    """The cores of all OpenMP places; empty where nothing is bound, or no OpenMP tells."""
    try:
        openmp = ctypes.CDLL(None)
        found: set[int] = set()
        for place in range(openmp.omp_get_num_places()):
            cores = (ctypes.c_int * openmp.omp_get_place_num_procs(place))()
            openmp.omp_get_place_proc_ids(place, cores)
            found.update(cores)
        return frozenset(found)
    except (AttributeError, OSError, TypeError):
        return frozenset()


def leave_the_bound_core() -> None:
    """For a thread that Python started: run on any core that the process was given. The thread that OpenMP bound, and
    its own, stay where they are."""
    if hasattr(os, "sched_setaffinity") and (cores := allowed_cores()):
        os.sched_setaffinity(0, cores)
