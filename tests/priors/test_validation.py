"""Validation is the process's: a block puts it back, and another thread's waits for its end."""

from __future__ import annotations

import threading

import pyro
import pyro.distributions as dist
import pytest
from pyro import infer, poutine

from varmeta.priors.validation import validation_enabled


def state() -> tuple[bool, ...]:
    return (
        dist.is_validation_enabled(),
        infer.is_validation_enabled(),
        poutine.is_validation_enabled(),
    )


@pytest.mark.parametrize("before", [True, False])
def test_another_threads_block_waits(before: bool) -> None:
    inside, seen = threading.Event(), list[tuple[bool, ...]]()

    def other() -> None:
        inside.wait()
        with validation_enabled(True):
            seen.append(state())

    thread = threading.Thread(target=other)
    with pyro.validation_enabled(before):
        held = state()
        thread.start()
        with validation_enabled(False):
            inside.set()
            thread.join(0.1)
            with validation_enabled(True):
                assert state() == (True,) * 3
            assert (state(), seen) == ((False,) * 3, [])
        thread.join()
        assert (state(), seen) == (held, [(True,) * 3])


def test_an_error_ends_the_block_too() -> None:
    before = state()
    with pytest.raises(KeyError), validation_enabled(not before[0]):
        raise KeyError
    assert state() == before
