"""Recurrent layers as plain tensor operations, which can be run for many tasks at once.

PyTorch's own kernels of `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells have no batching rule.  Here
are their formulas, step by step, on the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""What goes from step to step: h, and for an LSTM c, `(batch, hidden)` each."""


def unroll_recurrent_layers(net: nn.Module) -> None:
    """Let the network's recurrent layers run by their formulas."""
    for module in net.modules():
        found = _FORMULAS.get(type(module))
        if found is not None:
            module.__class__ = found


def can_be_unrolled(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's own; a subclass may do anything."""
    return type(module) in _FORMULAS or type(module) in _FORMULAS.values()


def _rnn(gates: Tensor, memory: Tensor, state: State, squash: Callable[[Tensor], Tensor]) -> State:
    return (squash(gates + memory),)


def _lstm(gates: Tensor, memory: Tensor, state: State, squash: Callable[[Tensor], Tensor]) -> State:
    i, f, g, o = (gates + memory).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, memory: Tensor, state: State, squash: Callable[[Tensor], Tensor]) -> State:
    (r, z, n), (from_r, from_z, from_n) = gates.chunk(3, -1), memory.chunk(3, -1)
    z = (z + from_z).sigmoid()
    n = (n + (r + from_r).sigmoid() * from_n).tanh()
    return ((1.0 - z) * n + z * state[0],)


class _Layers:
    """The forward of `nn.RNNBase`'s three kinds; nothing else of the class changes."""

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        if not isinstance(input, Tensor):
            raise ValueError(
                f"a recurrent layer is given a {type(input).__name__}, expected a tensor: pad "
                "sequences to one length"
            )
        step = {nn.RNNBase: _rnn, nn.LSTM: _lstm, nn.GRU: _gru}[_kind(self)]
        alone = input.dim() == 2
        x = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.batch_first else input
        # an LSTM's state is a pair, the others' a tensor
        begin = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
        if begin is not None and alone:
            begin = tuple(part.unsqueeze(1) for part in begin)
        _check(self, x, begin)
        squash = torch.relu if getattr(self, "nonlinearity", "tanh") == "relu" else torch.tanh
        ends: list[State] = []
        for layer in range(self.num_layers):
            outs = []
            for backward in range(1 + self.bidirectional):
                name = f"_l{layer}{'_reverse' * backward}"
                first = None if begin is None else tuple(part[len(ends)] for part in begin)
                out, end = _over_time(self, name, x, first, step, squash, bool(backward))
                outs.append(out)
                ends.append(end)
            x = torch.cat(outs, -1)
        last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        if alone:
            x, last = x.squeeze(1), tuple(part.squeeze(1) for part in last)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, last if _kind(self) is nn.LSTM else last[0]


def _check(module: Any, x: Tensor, begin: State | None) -> None:
    """Raise ValueError for what PyTorch's own layer refuses: here it would be broadcast.

    x `(steps, batch, features)`, begin `(layers, batch, hidden)` each.
    """
    if x.dim() != 3:
        raise ValueError(f"a recurrent layer takes x of 2 or 3 dimensions, not {x.dim()}")
    if not len(x):
        raise ValueError("a recurrent layer is given a sequence of no steps")
    if x.shape[-1] != module.input_size:
        raise ValueError(
            f"a recurrent layer is given {x.shape[-1]} features a step, expected "
            f"{module.input_size}"
        )
    if begin is None:
        return
    pair = _kind(module) is nn.LSTM
    if len(begin) != 1 + pair:
        raise ValueError(
            f"the hidden state of nn.{_kind(module).__name__.removesuffix('Base')} is "
            f"{'a pair of tensors (h, c)' if pair else 'a tensor'}, not {len(begin)}"
        )
    lead = module.num_layers * (1 + module.bidirectional), x.shape[1]
    sizes = module.proj_size or module.hidden_size, module.hidden_size
    for part, size in zip(begin, sizes, strict=False):
        if part.shape != (*lead, size):
            raise ValueError(
                f"a hidden state has the shape {tuple(part.shape)}, expected {(*lead, size)}, "
                "layers and batch first"
            )


def _kind(module: nn.Module) -> type[nn.Module]:
    return next((kind for kind in (nn.LSTM, nn.GRU) if isinstance(module, kind)), nn.RNNBase)


def _over_time(
    module: Any,
    name: str,
    x: Tensor,
    state: State | None,
    step: Callable[..., State],
    squash: Callable[[Tensor], Tensor],
    backward: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction over x `(steps, batch, features)`."""
    own: dict[str, Any] = {part: getattr(module, part + name, None)
           for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")}  # fmt: skip
    gates = linear(x, own["weight_ih"], own["bias_ih"])
    if state is None:
        h = x.new_zeros(x.shape[1], own["weight_hh"].shape[1])
        state = (h, x.new_zeros(x.shape[1], module.hidden_size)) if step is _lstm else (h,)
    outs = []
    for at in range(len(x))[:: -1 if backward else 1]:
        memory = linear(state[0], own["weight_hh"], own["bias_hh"])
        state = step(gates[at], memory, state, squash)
        if own["weight_hr"] is not None:  # an LSTM with projections
            state = (linear(state[0], own["weight_hr"]), state[1])
        outs.append(state[0])
    return torch.stack(outs[:: -1 if backward else 1]), state


class _RNN(_Layers, nn.RNN):  # type: ignore[misc]
    pass


class _LSTM(_Layers, nn.LSTM):  # type: ignore[misc]
    pass


class _GRU(_Layers, nn.GRU):  # type: ignore[misc]
    pass


class _LSTMCell(nn.LSTMCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        gates = linear(input, self.weight_ih, self.bias_ih)
        if hx is None:
            zeros = gates.new_zeros(*gates.shape[:-1], self.hidden_size)
            hx = zeros, zeros
        return _lstm(gates, linear(hx[0], self.weight_hh, self.bias_hh), hx, torch.tanh)


class _GRUCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        gates = linear(input, self.weight_ih, self.bias_ih)
        h = gates.new_zeros(*gates.shape[:-1], self.hidden_size) if hx is None else hx
        return _gru(gates, linear(h, self.weight_hh, self.bias_hh), (h,), torch.tanh)[0]


class _RNNCell(nn.RNNCell):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        gates = linear(input, self.weight_ih, self.bias_ih)
        h = gates.new_zeros(gates.shape) if hx is None else hx
        squash = torch.relu if self.nonlinearity == "relu" else torch.tanh
        return _rnn(gates, linear(h, self.weight_hh, self.bias_hh), (h,), squash)[0]


_FORMULAS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: _RNN,
    nn.LSTM: _LSTM,
    nn.GRU: _GRU,
    nn.LSTMCell: _LSTMCell,
    nn.GRUCell: _GRUCell,
    nn.RNNCell: _RNNCell,
}
