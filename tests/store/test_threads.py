"""A thread that Python starts leaves the core that OpenMP bound its parent to, for cores that the process was given."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, os, threading
given = sorted(os.sched_getaffinity(0))
import torch
torch.ones(200, 200) @ torch.ones(200, 200)
from quantailor.store.threads import leave_the_bound_core
main, found = sorted(os.sched_getaffinity(0)), []
def run():
    found.append(sorted(os.sched_getaffinity(0)))
    leave_the_bound_core()
    found.append(sorted(os.sched_getaffinity(0)))
thread = threading.Thread(target=run)
thread.start()
thread.join()
print(json.dumps([given, main, *found, sorted(os.sched_getaffinity(0))]))
"""


def affinities(**env):
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=os.environ | env, check=True
    )
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or (os.cpu_count() or 1) < 2, reason="one core, or no affinity, here"
)


def test_a_thread_leaves_the_core_that_its_parent_is_bound_to():
    given, main, inherited, after, main_after = affinities(
        OMP_NUM_THREADS="2", OMP_PROC_BIND="true", OMP_PLACES="cores"
    )
    if main == given:
        pytest.skip("this OpenMP does not bind the thread that loads it")
    assert inherited == main and after == given and main_after == main


def test_without_binding_nothing_changes():
    given, main, inherited, after, main_after = affinities(OMP_NUM_THREADS="2", OMP_PROC_BIND="false", OMP_PLACES="")
    assert given == main == inherited == after == main_after
