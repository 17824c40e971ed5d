"""Validation is the process's: whichever thread ends last, it is as it was before."""

from __future__ import annotations

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
@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_blocks_put_back_what_held(first_to_end: int, before: bool) -> None:
    with pyro.validation_enabled(before):
        held = state()
        blocks = [validation_enabled(False), validation_enabled(True)]
        for block in blocks:
            block.__enter__()
        assert state() == (True, True, True)
        blocks[first_to_end].__exit__(None, None, None)
        assert state() == ((True,) * 3 if first_to_end == 0 else (False,) * 3)
        blocks[1 - first_to_end].__exit__(None, None, None)
        assert state() == held


def test_pyros_own_stays_off() -> None:
    """What it is for: two blocks that overlap, as those of two threads do."""
    before = state()
    one, other = pyro.validation_enabled(False), pyro.validation_enabled(False)
    try:
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        other.__exit__(None, None, None)
        assert state() == (False, False, False)
    finally:
        for part, was in zip((dist, infer, poutine), before, strict=True):
            part.enable_validation(was)


def test_an_error_ends_the_block_too() -> None:
    before = state()
    with pytest.raises(KeyError), validation_enabled(not before[0]):
        raise KeyError
    assert state() == before
