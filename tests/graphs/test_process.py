"""Warnings are kept by the thread that asks, and by no other."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from varmeta.graphs.process import kept_warnings, unheard


@contextmanager
def shown_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield shown


def test_another_threads_warnings_are_shown() -> None:
    other = threading.Thread(target=lambda: warnings.warn("theirs", RuntimeWarning, stacklevel=1))
    with shown_warnings() as shown, kept_warnings(RuntimeWarning) as kept:
        warnings.warn("mine", RuntimeWarning, stacklevel=1)
        other.start()
        other.join()
    assert [str(one.message) for one in kept] == ["mine"]
    assert [str(one.message) for one in shown] == ["theirs"]


def test_other_categories_are_shown() -> None:
    with shown_warnings() as shown, kept_warnings(RuntimeWarning) as kept:
        warnings.warn("of columns", UserWarning, stacklevel=1)
    assert ([str(one.message) for one in shown], kept) == (["of columns"], [])


def test_filters_come_back_after_blocks_of_two_threads() -> None:
    before, inside, end = list(warnings.filters), threading.Event(), threading.Event()

    def other() -> None:
        with kept_warnings():
            inside.set()
            end.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    with unheard():  # does not wait for the other, and changes nothing meanwhile
        end.set()
        thread.join()
    assert list(warnings.filters) == before


def test_what_is_unheard() -> None:
    with shown_warnings() as shown, unheard("of no"):
        warnings.warn("of no matter", UserWarning, stacklevel=1)
        warnings.warn("of matter", UserWarning, stacklevel=1)
    assert [str(one.message) for one in shown] == ["of matter"]
