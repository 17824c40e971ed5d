"""Compiled graphs are kept, in the process and on disk for the next one, and are made by one
wrapper if not by another.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from varmeta.graphs import capture


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each attempt to compile."""
    real, found = capture._compiled_by, []

    def compiled_by(
        options: dict[str, Any], graph: torch.fx.GraphModule, examples: list[Tensor]
    ) -> Any:
        found.append(options)
        return real(options, graph, examples)

    monkeypatch.setattr(capture, "_compiled_by", compiled_by)
    return found


def test_what_is_compiled_is_found_again_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tried: list[dict[str, Any]]
) -> None:
    from torch._dynamo.utils import counters

    def function(x: Tensor) -> Tensor:
        return (x * 1.25).sin().sum()

    x = torch.linspace(0, 1, 7)
    assert torch.allclose(capture.Captured(function)(x), function(x))
    assert tried == [capture._wrappers([x])[0]]  # nothing fell back
    monkeypatch.setattr(capture, "_COMPILED", capture._Compiled())  # as another process starts
    before = counters["inductor"]["fxgraph_cache_hit"]
    assert torch.allclose(capture.Captured(function)(x), function(x))
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1


def test_python_calls_the_kernels_where_no_other_wrapper_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def compiled_by(
        options: dict[str, object], graph: torch.fx.GraphModule, examples: list[Tensor]
    ) -> object:
        tried.append(options)
        if options["cpp_wrapper"]:
            raise RuntimeError("no such wrapper")
        return graph

    monkeypatch.setattr(capture, "_COMPILED", capture._Compiled())
    monkeypatch.setattr(capture, "_compiled_by", compiled_by)
    x = torch.linspace(0, 1, 7)
    assert torch.equal(capture.Captured(torch.cos)(x), x.cos())
    assert [options["cpp_wrapper"] for options in tried] == [True, False]


def test_operations_that_cpp_calls_by_a_longer_way_are_right_and_nothing_is_said(
    tried: list[dict[str, Any]],
) -> None:
    def solve(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(torch.linalg.cholesky(a), b, upper=False).sin()

    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    lowering = logging.getLogger("torch._inductor.ir")
    lowering.addHandler(listener)
    generator = torch.Generator().manual_seed(0)
    root, b = (torch.randn(5, 3, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    a = root @ root.mT + torch.eye(3, dtype=torch.float64)
    try:
        torch.testing.assert_close(
            capture.Captured(solve)(a, b), solve(a, b), rtol=1e-14, atol=1e-14
        )
    finally:
        lowering.removeHandler(listener)
    assert not said and [options["cpp_wrapper"] for options in tried] == [True]


def test_the_nodes_of_a_graph_share_one_fake_mode() -> None:
    """One for each node, each with the whole Python stack, was half of what tracing took."""
    traced = capture.Captured(lambda x: (x.sin() * 2.0).sum()).traced(torch.linspace(0, 1, 7))
    values = [node.meta["val"] for node in traced.graph.graph.nodes if "val" in node.meta]
    modes = [value.fake_mode for value in values if isinstance(value, Tensor)]
    assert len(modes) >= 4 and all(mode is modes[0] for mode in modes)
