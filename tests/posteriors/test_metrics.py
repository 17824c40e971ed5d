"""Metrics against closed forms, scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from varmeta.posteriors import calibration, metrics

F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_log_density_is_the_log_of_the_mean():
    log_probs = normals(7, 5)
    assert torch.allclose(metrics.log_density(log_probs), log_probs.exp().mean(0).log(), rtol=1e-14)
    # far out, where exp underflows
    assert torch.allclose(
        metrics.log_density(log_probs - 2000), metrics.log_density(log_probs) - 2000
    )


def test_log_density_of_a_conjugate_model():
    theta = stats.norm.ppf(
        (np.arange(20_000) + 0.5) / 20_000
    )  # draws as quantiles: an integral to 1e-4
    y = np.array([-1.0, 0.0, 2.0])
    log_probs = stats.norm.logpdf(y, theta[:, None], 0.5)
    expected = stats.norm.logpdf(y, 0, math.sqrt(1.25))
    assert np.allclose(
        metrics.log_density(torch.from_numpy(log_probs)).numpy(), expected, atol=1e-4
    )


def test_rmse():
    a, b = normals(4, 3), normals(4, 3, seed=1)
    assert metrics.rmse(a, b).item() == pytest.approx(
        np.sqrt(np.mean((a - b).numpy() ** 2)), rel=1e-14
    )
    assert metrics.rmse(torch.tensor([1, 2]), torch.tensor([2, 3])).item() == 1.0


@pytest.mark.parametrize("fair", [True, False])
def test_crps_agrees_with_the_double_sum(fair):
    samples, y = normals(9, 4), normals(4, seed=1)
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1)) / (9 * 8 if fair else 81)
    expected = (samples - y).abs().mean(0) - pairs / 2
    assert torch.allclose(metrics.crps_sample(samples, y, fair=fair), expected, rtol=1e-12)
    # far from zero the score of shifted data is the same
    far = metrics.crps_sample(samples + 1e6, y + 1e6, fair=fair)
    assert torch.allclose(far, expected, atol=1e-9)


def test_crps_of_a_normal():
    y = np.array([-0.5, 0.3, 3.0])
    exact = y * (2 * stats.norm.cdf(y) - 1) + 2 * stats.norm.pdf(y) - 1 / math.sqrt(math.pi)
    draws = torch.from_numpy(stats.norm.ppf((np.arange(4000) + 0.5) / 4000))[:, None].expand(
        4000, 3
    )
    assert np.allclose(
        metrics.crps_sample(draws, torch.from_numpy(y), fair=False).numpy(), exact, atol=1e-3
    )


def test_a_normal_row_in_float32_keeps_its_digits_and_tells_lost_ones():
    """Two outputs with correlation 1 - 1e-6, which float32 squares away; and a covariance that is
    none, of which nothing was said."""
    covariance = torch.tensor([[[1.0, 1 - 1e-6], [1 - 1e-6, 1.0]]])
    mean, y = torch.zeros(1, 2), torch.tensor([[3.0, 3.0]])
    exact = stats.multivariate_normal([0, 0], covariance[0].double()).logpdf([3.0, 3.0])
    assert metrics.normal(mean, covariance, y)["log_density"] == pytest.approx(exact, rel=1e-9)
    none = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    assert math.isnan(metrics.normal(mean, none, y)["log_density"])


def test_fair_crps_does_not_depend_on_the_number_of_draws():
    y = torch.zeros(200_000, dtype=F64)
    exact = 2 * stats.norm.pdf(0) - 1 / math.sqrt(math.pi)
    score = metrics.crps_sample(normals(2, 200_000), y)
    assert score.mean().item() == pytest.approx(
        exact, abs=5 * score.std().item() / math.sqrt(len(y))
    )
    assert metrics.crps_sample(normals(2, 200_000), y, fair=False).mean().item() > exact + 0.2


def test_one_draw():
    assert metrics.crps_sample(torch.tensor([[3.0]]), torch.tensor([1.0]), fair=False).tolist() == [
        2.0
    ]
    with pytest.raises(ValueError, match="at least 2 draws"):
        metrics.crps_sample(torch.tensor([[3.0]]), torch.tensor([1.0]))


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("draws", [1, 2, 50])
def test_interval_ends_are_numpy_quantiles(level, draws):
    samples, y = normals(draws, 300), normals(300, seed=1)
    lower, upper = np.quantile(samples.numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
    expected = np.mean((lower <= y.numpy()) & (y.numpy() <= upper))
    assert calibration.interval_coverage(samples, y, level).item() == pytest.approx(expected)


def test_coverage_of_calibrated_draws():
    covered = calibration.interval_coverage(
        normals(99, 100_000), normals(100_000, seed=1), 0.8
    ).item()
    # order statistics of S draws split the line into S + 1 equally probable parts: 0.8 (S - 1) / (S
    # + 1)
    assert covered == pytest.approx(0.8 * 98 / 100, abs=5 * math.sqrt(0.16 / 100_000))


def test_pit_is_uniform_for_calibrated_draws_and_mid_for_ties():
    values = calibration.pit(normals(999, 5000), normals(5000, seed=1))
    assert stats.kstest(values.numpy(), "uniform").pvalue > 0.01
    assert (
        stats.kstest(
            calibration.pit(normals(999, 5000) * 2, normals(5000, seed=1)).numpy(), "uniform"
        ).pvalue
        < 1e-6
    )
    tied = calibration.pit(torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([1.0]))
    assert tied.tolist() == [(1 + 1 + 0.5) / 4]


def test_calibration_error_agrees_with_a_loop():
    values = torch.from_numpy(np.random.default_rng(0).beta(2, 1, 37))
    levels = np.linspace(0.05, 0.95, 20)
    gaps = [np.mean(values.numpy() <= p) - p for p in levels]
    assert calibration.calibration_error(values).item() == pytest.approx(np.mean(np.abs(gaps)))
    assert calibration.calibration_error(values, kind="rms").item() == pytest.approx(
        np.sqrt(np.mean(np.square(gaps)))
    )
    assert calibration.calibration_error(values, levels=[0.3]).item() == pytest.approx(
        abs(np.mean(values.numpy() <= 0.3) - 0.3)
    )


def test_a_pit_equal_to_the_level_counts_as_below():
    assert calibration.calibration_error(
        torch.tensor([0.25, 0.5, 0.75]), levels=[0.5]
    ).item() == pytest.approx(2 / 3 - 0.5)


def test_calibration_error_of_a_shifted_normal():
    grid = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    values = torch.from_numpy(
        stats.norm.cdf(grid + 1.0)
    )  # the truth lies one sd above the prediction
    levels = np.linspace(0.05, 0.95, 20)
    exact = np.mean(np.abs(stats.norm.cdf(stats.norm.ppf(levels) - 1.0) - levels))
    assert calibration.calibration_error(values).item() == pytest.approx(exact, abs=1e-4)
    assert (
        calibration.calibration_error(torch.from_numpy((np.arange(20_000) + 0.5) / 20_000)).item()
        < 1e-4
    )


def test_calibration_error_from_draws_is_that_of_their_pit():
    samples, y = normals(50, 30), 2 * normals(30, seed=1)
    assert calibration.calibration_error(samples, y) == calibration.calibration_error(
        calibration.pit(samples, y)
    )


def test_error_rate():
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]])
    assert metrics.error_rate(probs, torch.tensor([1, 1, 2, 0])).item() == 0.25


def test_expected_calibration_error_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 200)
    y = rng.integers(0, 4, 200)
    confidence, right = probs.max(1), probs.argmax(1) == y
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    got = calibration.expected_calibration_error(torch.from_numpy(probs), torch.from_numpy(y))
    assert got.item() == pytest.approx(expected, rel=1e-12)
    sure = torch.eye(3, dtype=F64)
    assert calibration.expected_calibration_error(sure, torch.tensor([0, 1, 2])).item() == 0.0
    assert calibration.expected_calibration_error(sure, torch.tensor([1, 2, 0])).item() == 1.0


def test_rows_of_the_table():
    samples, y = (
        normals(20, 6, 2),
        normals(6, 2, seed=1),
    )  # vector observations: every number counts
    row = metrics.numbers(normals(20, 6), samples, y, 0.5)
    flat = metrics.numbers(normals(20, 6), samples.reshape(20, 12), y.reshape(12), 0.5)
    assert row["n"] == 6
    assert {k: v for k, v in row.items() if k != "n"} == pytest.approx(
        {k: v for k, v in flat.items() if k != "n"}
    )
    assert list(row) == [
        "n",
        "log_density",
        "rmse",
        "coverage",
        "calibration_error",
        "crps",
        "log_density_se",
    ]
    assert row["rmse"] == pytest.approx(np.sqrt(np.mean((samples.mean(0) - y).numpy() ** 2)))
    probs = torch.tensor([[[1.0, 0.0]], [[0.4, 0.6]]])  # the mean says class 0, with 0.7
    found = metrics.classes(torch.zeros(2, 1), probs.mean(0), torch.tensor([0.0]))
    assert found == pytest.approx(
        {
            "n": 1,
            "log_density": 0.0,
            "error_rate": 0.0,
            "calibration_error": 0.3,
            "log_density_se": 0.0,
        }
    )


def test_one_draw_still_has_a_row():
    row = metrics.numbers(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(2))
    assert (row["crps"], row["rmse"], row["coverage"]) == (1.0, 1.0, 0.0)


def test_nan_is_never_counted_as_a_number():
    samples, y = normals(10, 3), normals(3, seed=1)
    samples[4, 1] = math.nan
    assert calibration.interval_coverage(samples, y).isnan()
    assert calibration.calibration_error(samples, y).isnan()
    assert calibration.pit(samples, y).isnan().tolist() == [False, True, False]
    assert metrics.crps_sample(samples, y).isnan().tolist() == [False, True, False]
    probs = torch.tensor([[0.5, math.nan]])
    assert metrics.error_rate(probs, torch.tensor([0])).isnan()
    assert calibration.expected_calibration_error(probs, torch.tensor([0])).isnan()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: metrics.log_density(torch.zeros(3)), r"\(draws, n\)"),
        (lambda: metrics.rmse(torch.zeros(3), torch.zeros(3, 1)), "share a shape"),
        (lambda: metrics.crps_sample(torch.zeros(5, 3), torch.zeros(5)), "draws first"),
        (lambda: calibration.pit(torch.zeros(5, 0), torch.zeros(0)), "nothing to judge"),
        (
            lambda: calibration.interval_coverage(torch.zeros(5, 3), torch.zeros(3), 90),
            "level must be a probability",
        ),
        (lambda: calibration.calibration_error(torch.tensor([1.5])), "between 0 and 1"),
        (lambda: calibration.calibration_error(torch.zeros(0)), "no observations"),
        (lambda: calibration.calibration_error(torch.zeros(1), levels=[]), "levels"),
        (
            lambda: calibration.calibration_error(torch.zeros(1), kind="l2"),
            "kind must be one of .* not 'l2'",
        ),
        (lambda: metrics.error_rate(torch.zeros(3, 2), torch.tensor([0, 1, 2])), r"0, \.\.\., 1"),
        (lambda: metrics.error_rate(torch.zeros(3, 2), torch.zeros(3, 1)), r"\(n, classes\)"),
        (
            lambda: calibration.expected_calibration_error(torch.ones(1, 2), torch.zeros(1), 0),
            "num_bins",
        ),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
