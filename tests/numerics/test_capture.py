"""Compiled graphs are kept: in the process, and on disk for the next one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varmeta.numerics import capture


def test_what_is_compiled_is_found_again_by_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    def function(x: Tensor) -> Tensor:
        return (x * 1.25).sin().sum()

    x = torch.linspace(0, 1, 7)
    assert torch.allclose(capture.Captured(function)(x), function(x))
    monkeypatch.setattr(capture, "_COMPILED", capture._Compiled())  # as another process starts
    before = counters["inductor"]["fxgraph_cache_hit"]
    assert torch.allclose(capture.Captured(function)(x), function(x))
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1
