"""kill -9 while a folder is replaced: the old or the new one is there, whole, whatever the moment."""

import json
import os
import random
import signal
import time

from quantailor import api
from quantailor.store.manifest import verify
from tests.formats.making import bytes_of

KILLS = 12


def save_for_ever(models: list[api.Model], out) -> None:
    for turn in range(10_000):
        api.save(models[turn % len(models)], out, overwrite=True)


def test_kill_9_during_save_leaves_a_whole_folder(saved_as, tmp_path):
    made = [saved_as("llama", scheme) for scheme in ("w8a8", "w4a16-g32")]
    whole = {json.dumps(bytes_of(folder)) for _, folder in made}
    out = tmp_path / "model"
    api.save(made[0][0], out)
    draw = random.Random(0)
    left_over = 0
    for _ in range(KILLS):
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever([simulated for simulated, _ in made], out)
            finally:
                os._exit(99)
        time.sleep(draw.uniform(0.02, 0.5))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        left_over += sum(path.name != "model" for path in tmp_path.iterdir())
        assert api.load(out).is_packed  # a reader puts back what lies between two renames
        verify(out)
        assert json.dumps(bytes_of(out)) in whole
    assert left_over > 0, "some of the kills must have come in the middle of a save"

    api.save(made[0][0], out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "the next writer clears the table"
