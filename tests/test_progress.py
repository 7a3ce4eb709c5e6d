"""A signal whose exception is swallowed stops the work at its next step."""

import contextlib

import pytest

from quantailor.cli.console import ConsoleProgress
from quantailor.progress import Progress, go_on, stop_with


@pytest.mark.parametrize("make", [Progress, ConsoleProgress])
def test_a_swallowed_interrupt_comes_back(make):
    steps = 0
    try:
        with pytest.raises(KeyboardInterrupt), make().task("work", total=3) as advance:
            for _ in range(3):
                if steps == 1:
                    with contextlib.suppress(BaseException):  # a library that catches everything
                        error = KeyboardInterrupt()
                        stop_with(error)
                        raise error
                advance(1)
                steps += 1
    finally:
        go_on()
    assert steps == 1
    with make().task("work", total=1) as advance, make().counted("more") as update:
        advance(1)
        update(1, 1)
