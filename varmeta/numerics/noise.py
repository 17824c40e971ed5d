"""Random numbers as a function of (seed, step, task), without a generator's state.

Every number is a hash of its own address (seed, step, task id, draw k, coordinate j).  So a task
meets the same noise whichever tasks share its batch, in whichever order, in whichever process, and
however many draws are asked for; and a run that is resumed needs no generator to be saved.

The hash absorbs one integer of the address at a time: h <- mix(h + (value + 1) * GOLDEN), with
SplitMix64's output function as `mix` (Steele, Lea and Flood, Fast splittable pseudorandom number
generators, OOPSLA 2014).  It is meant for simulation, not for secrets.
"""

from __future__ import annotations

import hashlib
import math
import operator

import numpy as np
import torch
from torch import Tensor


def normal(
    seed: int | Tensor,
    step: int | Tensor,
    ids: Tensor,
    num: int,
    size: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draws of N(0, 1), `(num, tasks, size)`, on the device of `ids`.

    seed, step: any integers of 64 bits, or int64 tensors `()`: then a traced graph serves every
        seed and step.
    ids: the tasks' names as int64 numbers, `(tasks,)`; see `task_id`.
    num, size: how many draws, of how many coordinates; more draws begin with the numbers of fewer.
    dtype: the uniforms and the radius are made in float64, so float32 sees float64's noise but for
        a few roundings, 3e-6 at most; lower dtypes see float32's, rounded.

    Raises TypeError for ids, a dtype, or integers of the wrong kind, ValueError for a wrong shape
    or a negative number.

    >>> ids = torch.tensor([task_id("a"), task_id("b")])
    >>> draws = normal(0, 0, ids, num=3, size=2)
    >>> draws.shape, torch.equal(draws[:2, 1:], normal(0, 0, ids[1:], num=2, size=2))
    (torch.Size([3, 2, 2]), True)
    """
    _check(seed, step, ids, num, size, dtype)
    # Box-Muller: the coordinates i and i + pairs are the cosine and the sine of one pair of
    # uniforms.  Side by side they would have to be stored one by one, which takes three times as
    # long as making them.
    pairs = (size + 1) // 2
    row = _address(seed, step, ids, num, stream=0)
    first = 2 * _counting(pairs, ids)
    u, v = (
        _open_unit(_absorb(row, coordinate), torch.float64) for coordinate in (first, first + 1)
    )
    # the radius needs float64's small uniforms for its tail; cosine and sine lose nothing but
    # digits, and take most of the time
    single = dtype if dtype == torch.float64 else torch.float32
    radius, angle = (-2 * u.log()).sqrt().to(single), (2 * math.pi * v).to(single)
    return torch.cat([(radius * angle.cos()).to(dtype), (radius * angle.sin()).to(dtype)], -1)[
        ..., :size
    ]


def uniform(
    seed: int | Tensor,
    step: int | Tensor,
    ids: Tensor,
    num: int,
    size: int,
    dtype: torch.dtype = torch.float64,
    *,
    first: int = 0,
) -> Tensor:
    """Uniform draws `(num, tasks, size)` in the open interval (0, 1).

    Never 0 or 1, so logarithms are finite.

    Arguments, errors and invariances as for `normal`, but independent of it; more coordinates begin
    with fewer too.
    first: the number of the first draw; `uniform(..., num=5)[3:]` is `uniform(..., num=2,
        first=3)`.
    Resolution: 2^-52 in float64, 2^-23 in float32.

    >>> draws = uniform(7, 0, torch.tensor([3]), num=1000, size=1)
    >>> bool(draws.min() > 0), bool(draws.max() < 1), round(draws.mean().item(), 1)
    (True, True, 0.5)
    """
    _check(seed, step, ids, num, size, dtype)
    return _open_unit(
        _absorb(_address(seed, step, ids, num, stream=1, first=first), _counting(size, ids)), dtype
    )


def task_id(name: str) -> int:
    """A task's number from its name: 63 bits of BLAKE2b.

    It is the same in every process and on every machine.

    >>> task_id("Aitkin county") == task_id("Aitkin county") != task_id("Anoka county")
    True
    """
    if not isinstance(name, str):
        raise TypeError(f"a task's name must be a str, not {type(name).__name__}")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _signed(value: int) -> int:
    """The 64 low bits of an integer as int64 reads them."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: SplitMix64's increment
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _absorb(h: Tensor, value: Tensor) -> Tensor:
    h = h + (value + 1) * _GOLDEN  # int64 arithmetic wraps around, on purpose
    h = (h ^ _shift(h, 30)) * _MIX_1
    h = (h ^ _shift(h, 27)) * _MIX_2
    return h ^ _shift(h, 31)


def _shift(h: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64's own shift copies the sign bit, so it is masked away."""
    return (h >> bits) & ((1 << (64 - bits)) - 1)


def _address(
    seed: int | Tensor, step: int | Tensor, ids: Tensor, num: int, stream: int, first: int = 0
) -> Tensor:
    """One hash for every draw and task, int64 `(num, tasks, 1)`; `stream` separates the kinds of
    number.
    """
    h = torch.zeros((), dtype=torch.int64, device=ids.device)
    for value in (stream, seed, step):
        h = _absorb(h, value if isinstance(value, Tensor) else torch.full_like(h, _signed(value)))
    return _absorb(_absorb(h, ids.reshape(-1, 1)), _counting(num, ids).reshape(-1, 1, 1) + first)


def _counting(size: int, like: Tensor) -> Tensor:
    # by numpy: in a traced graph this is then an input, where arange's products would overflow the
    # compiler's symbols
    return torch.from_numpy(np.arange(size)).to(like.device)


def _open_unit(h: Tensor, dtype: torch.dtype) -> Tensor:
    """(n + 1/2) / 2^bits of the leading bits n: with one bit fewer than the significand neither end
    is reached.
    """
    bits = round(-math.log2(torch.finfo(dtype).eps))
    return (_shift(h, 64 - bits).to(dtype) + 0.5) * 2.0**-bits


def _check(
    seed: int | Tensor, step: int | Tensor, ids: Tensor, num: int, size: int, dtype: torch.dtype
) -> None:
    for name, value in (("seed", seed), ("step", step), ("num", num), ("size", size)):
        if isinstance(value, Tensor) and value.shape == () and value.dtype == torch.int64:
            continue
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if num < 0 or size < 0:
        raise ValueError(f"num and size must not be negative, but are {num} and {size}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, not {ids.dtype}: make them with task_id(name)")
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape (tasks,), not {tuple(ids.shape)}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, not {dtype}")
