"""Compiled graphs are kept, in the process and on disk for the next one, and are made by one wrapper if not by another."""

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


def test_python_calls_the_kernels_where_no_other_wrapper_can(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def compiled_by(options: dict[str, object], graph: torch.fx.GraphModule, examples: list[Tensor]) -> object:
        tried.append(options)
        if options:
            raise RuntimeError("no such wrapper")
        return graph

    monkeypatch.setattr(capture, "_COMPILED", capture._Compiled())
    monkeypatch.setattr(capture, "_compiled_by", compiled_by)
    x = torch.linspace(0, 1, 7)
    assert torch.equal(capture.Captured(torch.cos)(x), x.cos())
    assert len(tried) == 2 and tried[0] and not tried[1]


def test_the_compiler_knows_the_options_of_every_wrapper() -> None:
    from torch._inductor import config

    for options in capture._wrappers([torch.ones(1)]):
        with config.patch(options):
            pass
