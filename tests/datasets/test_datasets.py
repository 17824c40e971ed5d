from importlib.resources import files

import numpy as np
import pytest
import scipy.stats
import torch

from tests.conftest import shared_data
from varmeta import datasets

FOLDERS = {
    "radon": "radon_mn",
    "rats": "rats",
    "eight_schools": "eight_schools",
    "gapminder": "gapminder",
}
GENERATORS = [datasets.sinusoids, datasets.lines, datasets.polynomials]


def numpy_parts(tasks, part="support"):
    return [tuple(tensor.numpy() for tensor in getattr(task, part)) for task in tasks]


def marginal_log_likelihood(tasks, loc, cov, noise):
    """sum_i log N(y_i | X_i loc, X_i cov X_i' + noise^2 I) with X_i = (1, x_i)."""
    total = 0.0
    for x, y in numpy_parts(tasks):
        design = np.column_stack([np.ones(len(y)), x])
        total += scipy.stats.multivariate_normal(
            design @ loc, design @ cov @ design.T + noise**2 * np.eye(len(y)), allow_singular=False
        ).logpdf(y)
    return total


@pytest.mark.parametrize(("name", "folder"), FOLDERS.items())
def test_the_shipped_table_is_the_reference_table(name, folder):
    shipped = (files("varmeta.datasets") / "data" / f"{name}.csv").read_bytes()
    assert shipped == (shared_data(folder) / "data.csv").read_bytes()


def test_radon_has_the_known_marginal_likelihood():
    # maximum of the marginal likelihood under N(theta0, tau^2 I), computed in R for the same table
    tasks = datasets.radon()
    value = marginal_log_likelihood(tasks, [1.49057, -0.64351], 0.30976**2 * np.eye(2), 0.71756)
    assert value == pytest.approx(-1044.2147, abs=1e-4)


def test_radon_with_uranium_has_one_reading_per_county():
    tasks = datasets.radon(uranium=True)
    assert tasks.names == datasets.radon().names
    for (x, _), (floor, _) in zip(numpy_parts(tasks), numpy_parts(datasets.radon()), strict=True):
        assert (x[:, :1] == floor).all()
        assert len(set(x[:, 1])) == 1


def test_rats_have_the_known_marginal_likelihood():
    # weeks instead of days: multiply the prior's second row and column by 7
    tasks = datasets.rats()
    cov = np.diag([10.049**2, (10.049 / 7) ** 2])
    assert marginal_log_likelihood(tasks, [242.65333, 43.3 / 7], cov, 6.0445) == pytest.approx(
        -573.4739, abs=1e-4
    )


def test_rats_can_keep_their_days():
    for (x, y), (day, weight) in zip(
        numpy_parts(datasets.rats()), numpy_parts(datasets.rats(centre=False)), strict=True
    ):
        assert (day[:, 0] == [8, 15, 22, 29, 36]).all()
        assert (x == day - 22).all()
        assert (y == weight).all()


def test_eight_schools_are_rubins():
    tasks = datasets.eight_schools()
    effect = np.array([y.item() for _, y in numpy_parts(tasks)])
    std_err = np.array([x.item() for x, _ in numpy_parts(tasks)])
    assert effect.tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    weights = std_err**-2
    assert (weights @ effect) / weights.sum() == pytest.approx(7.6856, abs=1e-4)
    assert weights.sum() ** -0.5 == pytest.approx(4.0719, abs=1e-4)
    assert tasks.batch().support.x.shape == tasks.batch().support.y.shape == (8, 1)


def test_gapminder_has_the_known_baseline():
    errors = [
        np.mean(y) - target
        for (_, y), (_, target) in zip(
            numpy_parts(datasets.gapminder("test")),
            numpy_parts(datasets.gapminder("test"), "query"),
            strict=True,
        )
    ]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(11.8738, abs=1e-4)


def test_gapminder_is_split_by_country_and_year():
    whole = datasets.gapminder()
    parts = [datasets.gapminder(split).names for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(whole) == 142
    for (x, _), (query, _) in zip(numpy_parts(whole), numpy_parts(whole, "query"), strict=True):
        assert np.allclose(20 * x[:, 0] + 1979.5, range(1952, 1978, 5))
        assert np.allclose(20 * query[:, 0] + 1979.5, range(1982, 2008, 5))


def test_gapminder_with_gdp_adds_a_column():
    frame = datasets.gapminder("val", as_frame=True)
    tasks = datasets.gapminder("val", gdp=True)
    gdp = np.concatenate([np.concatenate([t.support[0], t.query[0]])[:, 1] for t in tasks])
    assert np.allclose(10 ** (gdp + 3.5), frame["gdp_per_cap"])


def test_gapminder_refuses_another_split():
    with pytest.raises(ValueError, match="'train', 'val', 'test'"):
        datasets.gapminder("validation")


@pytest.mark.parametrize("name", FOLDERS)
def test_tables_and_dtype(name):
    load = getattr(datasets, name)
    frame, batch = load(as_frame=True), load().batch()
    query = 0 if batch.query is None else int(batch.query.mask.sum())
    assert len(frame) == int(batch.support.mask.sum()) + query
    assert batch.support.x.dtype == batch.support.y.dtype == torch.float64
    assert not frame.isna().any().any()
    mine = load(as_frame=True)
    mine.iloc[:, -1] = 0  # a caller's changes stay the caller's
    assert load(as_frame=True).equals(frame)


def test_sinusoids_follow_their_formula():
    tasks = datasets.sinusoids(500, 8, 5, seed=3, dtype=torch.float64)
    amplitude, phase = [], []
    for task in tasks:
        x, y = (torch.cat(both).numpy() for both in zip(task.support, task.query, strict=True))
        # a sin(x - b) = (a cos b) sin x - (a sin b) cos x is linear in two numbers
        (p, q), residual, *_ = np.linalg.lstsq(
            np.column_stack([np.sin(x[:, 0]), -np.cos(x[:, 0])]), y, rcond=None
        )
        assert residual < 1e-20
        amplitude.append(np.hypot(p, q))
        phase.append(np.arctan2(q, p))
    inputs = torch.cat([task.support[0] for task in tasks]).flatten().numpy()
    for values, low, high in [(amplitude, 0.1, 5.0), (phase, 0.0, np.pi), (inputs, -5.0, 5.0)]:
        assert scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def test_polynomials_have_the_stated_prior_and_noise():
    loc, scale = np.array([1.0, -2.0, 0.5]), np.array([0.3, 2.0, 1.0])
    exact = datasets.polynomials(
        1000, 6, seed=1, loc=loc, scale=scale, noise=0.0, dtype=torch.float64
    )
    noisy = datasets.polynomials(
        1000, 6, seed=1, loc=loc, scale=scale, noise=0.2, dtype=torch.float64
    )
    coefficients = np.array(
        [np.linalg.solve(np.vander(x[:3, 0], 3, True), y[:3]) for x, y in numpy_parts(exact)]
    )
    for values, mean, sd in zip(coefficients.T, loc, scale, strict=True):
        assert scipy.stats.kstest(values, "norm", (mean, sd)).pvalue > 1e-3
    noise = [b[1] - a[1] for a, b in zip(numpy_parts(exact), numpy_parts(noisy), strict=True)]
    assert scipy.stats.kstest(np.ravel(noise), "norm", (0, 0.2)).pvalue > 1e-3


def test_lines_are_lines():
    settings = {"intercept": (5.0, 0.1), "slope": (-3.0, 0.0), "noise": 0.0, "dtype": torch.float64}
    x, y = numpy_parts(datasets.lines(1, 50, **settings))[0]
    slope, intercept = np.polyfit(x[:, 0], y, 1)
    assert slope == pytest.approx(-3.0)
    assert abs(intercept - 5.0) < 0.5
    assert np.allclose(y, intercept + slope * x[:, 0])


@pytest.mark.parametrize("make", GENERATORS)
def test_generated_tasks_depend_on_the_seed_alone(make):
    state = torch.get_rng_state()
    small, large, other = make(3, 4, 2, seed=5), make(6, 9, 8, seed=5), make(3, 4, 2, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.names == large.names[:3]
    assert not set(small.names) & set(other.names)
    for a, b, c in zip(small, large, other, strict=False):
        for part, number in (("support", 4), ("query", 2)):
            for p, q, r in zip(getattr(a, part), getattr(b, part), getattr(c, part), strict=True):
                assert torch.equal(p, q[:number])
                assert not torch.allclose(p, r)


@pytest.mark.parametrize("make", GENERATORS)
def test_generated_tasks_have_the_stated_shapes(make):
    tasks = make(3, 0, 4, dtype=torch.float64)
    assert int(tasks.batch().support.mask.sum()) == 0
    assert tasks.batch().query.x.shape == (3, 4, 1)
    assert tasks.batch().query.y.shape == (3, 4)
    assert tasks.dtype == torch.float64
    assert make(3, 4).batch().query is None
    assert make(3, 4).dtype == torch.get_default_dtype()


@pytest.mark.parametrize("make", GENERATORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_support": -1}, "num_support"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"x_range": (1.0, 0.0)}, "x_range"),
    ],
)
def test_generators_refuse_nonsense(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**{"num_tasks": 2, "num_support": 3, **change})


@pytest.mark.parametrize(
    "change", [{"scale": -1.0}, {"scale": [1.0, 2.0]}, {"loc": ()}, {"loc": (float("inf"),)}]
)
def test_polynomials_refuse_a_prior_that_makes_no_sense(change):
    with pytest.raises(ValueError, match=r"scale|loc|sds"):
        datasets.polynomials(2, 3, **change)
