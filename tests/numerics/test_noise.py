import hashlib
import math

import pytest
import scipy.stats
import torch

from varmeta.numerics.noise import _absorb, normal, task_id, uniform

torch.set_num_threads(1)
KINDS = [normal, uniform]
IDS = torch.tensor([task_id(f"task {i}") for i in range(50)])


@pytest.mark.parametrize(("kind", "distribution"), [(normal, "norm"), (uniform, "uniform")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_distribution(kind, distribution, dtype):
    draws = kind(3, 5, IDS, 200, 11, dtype)
    assert draws.shape == (200, 50, 11)
    assert draws.dtype == dtype
    assert scipy.stats.kstest(draws.double().flatten().numpy(), distribution).pvalue > 1e-3


def test_moments_of_the_normal():
    draws = normal(0, 0, IDS, 1000, 21)
    n = draws.numel()
    # the sampling error of the k-th moment is sqrt((E z^2k - (E z^k)^2) / n); four of them allowed
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(draws.pow(power).mean().item() - expected) < 4 * math.sqrt(variance / n)


def test_neighbours_are_uncorrelated():
    draws = normal(0, 0, torch.arange(40), 4000, 6)  # ids in a row are the hardest for a hash
    others = [normal(1, 0, torch.arange(40), 4000, 6), normal(0, 1, torch.arange(40), 4000, 6)]
    pairs = [
        (draws[1:], draws[:-1]),
        (draws[:, 1:], draws[:, :-1]),
        (draws[..., 1:], draws[..., :-1]),
        (draws[..., :3], draws[..., 3:]),  # the two halves of a pair
        *((draws, other) for other in others),
        (draws, uniform(0, 0, torch.arange(40), 4000, 6) - 0.5),
    ]
    for a, b in pairs:
        for transform in (lambda z: z, lambda z: z.square() - z.square().mean()):
            x, y = transform(a).flatten(), transform(b).flatten()
            correlation = (x * y).mean() / (x.std() * y.std())
            assert correlation.abs().item() < 4 / math.sqrt(x.numel())


def test_no_number_comes_twice():
    draws = uniform(0, 0, torch.arange(100), 100, 50).flatten()
    # 5e5 numbers out of 2^52: a coincidence has probability 3e-5
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_number_depends_on_its_address_alone(kind, dtype):
    whole = kind(11, 4, IDS, 9, 7, dtype)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:13]
    assert torch.equal(kind(11, 4, IDS[order], 9, 7, dtype), whole[:, order])
    assert torch.equal(kind(11, 4, IDS, 4, 7, dtype), whole[:4])
    assert not torch.equal(kind(12, 4, IDS, 9, 7, dtype), whole)
    assert not torch.equal(kind(11, 5, IDS, 9, 7, dtype), whole)


def test_every_number_of_coordinates():
    for size in range(8):
        assert torch.equal(uniform(11, 4, IDS, 9, size), uniform(11, 4, IDS, 9, 7)[..., :size])
        draws = normal(11, 4, IDS, 9, size)
        assert draws.shape == (9, 50, size)
        # as many as there are, and no pair twice
        assert draws.unique().numel() == draws.numel()


def test_lower_dtypes_see_the_noise_of_float64():
    exact, single = (normal(2, 3, IDS, 40, 500, dtype) for dtype in (torch.float64, torch.float32))
    assert (single - exact).abs().max() < 3e-6
    assert exact.abs().max() > 4.5  # the tail, whose angle's rounding weighs most, is among them
    for half in (torch.float16, torch.bfloat16):
        assert torch.equal(normal(2, 3, IDS, 40, 500, half), single.to(half))


@pytest.mark.parametrize("kind", KINDS)
def test_the_global_generator_is_left_alone(kind):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = kind(0, 0, IDS, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(kind(0, 0, IDS, 2, 3), first)


@pytest.mark.parametrize("value", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_mixing_is_splitmix64(value):
    """The same arithmetic in Python's unbounded integers."""
    wrap = 2**64
    h = (value + 1) * 0x9E3779B97F4A7C15 % wrap
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % wrap
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB % wrap
    h ^= h >> 31
    assert _absorb(torch.tensor(0), torch.tensor(value)).item() % wrap == h


def test_mixing_agrees_with_the_published_sequence():
    # the first output of SplitMix64 seeded with 0
    assert _absorb(torch.tensor(0), torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


def test_extreme_addresses():
    ids = torch.tensor([0, 2**63 - 1, -(2**63)])
    for seed in (0, -1, 2**64 - 1, 2**70):
        assert normal(seed, -5, ids, 2, 3).isfinite().all()
    assert normal(0, 0, ids[:0], 2, 3).shape == (2, 0, 3)
    assert normal(0, 0, ids, 0, 0).shape == (0, 3, 0)


def test_task_id():
    ids = [task_id(f"task {i}") for i in range(10_000)]
    assert len(set(ids)) == 10_000
    assert 0 <= min(ids) < max(ids) < 2**63
    assert max(ids) > 2**62
    assert task_id("é") == int(hashlib.blake2b("é".encode(), digest_size=8).hexdigest(), 16) // 2


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0.5, 0, IDS, 1, 1), TypeError, "seed must be an integer"),
        ((0, "a", IDS, 1, 1), TypeError, "step must be an integer"),
        ((0, 0, IDS.int(), 1, 1), TypeError, "int64"),
        ((0, 0, IDS[0], 1, 1), ValueError, r"\(tasks,\)"),
        ((0, 0, IDS, -1, 1), ValueError, "negative"),
        ((0, 0, IDS, 1, 1, torch.int64), TypeError, "floating"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind, arguments, error, says):
    with pytest.raises(error, match=says):
        kind(*arguments)


def test_a_name_must_be_text():
    with pytest.raises(TypeError, match="str"):
        task_id(3)
