"""Quantile normalization, its guard, its inverse, and openpi's file."""

import json
import warnings

import numpy as np
import pytest

from insula.data import normalize as normalize
from insula.data.normalize import EPSILON, NormStats


@pytest.fixture
def values(np_rng):
    return np_rng.normal([1.0, -50.0, 0.0], [0.1, 20.0, 3.0], (2000, 3))


def test_quantiles_go_to_the_ends_and_nothing_is_clipped(values):
    stats = normalize.fit_stats_of(values)
    z = stats.normalize(values)
    np.testing.assert_allclose(np.quantile(z, [0.01, 0.99], axis=0), [[-1] * 3, [1] * 3], atol=1e-5)
    assert z.dtype == np.float32 and (np.abs(z) > 1).mean() == pytest.approx(0.02, abs=0.005)
    assert np.abs(z).max() > 1.1


def test_the_formula_is_openpis(values):
    stats = normalize.fit_stats_of(values)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    np.testing.assert_allclose(stats.normalize(values), (values - q01) / (q99 - q01 + 1e-6) * 2 - 1, atol=2e-5)


def test_the_inverse_is_exact_also_far_outside(values):
    stats = normalize.fit_stats_of(values)
    far = values * 100
    np.testing.assert_allclose(stats.unnormalize(stats.normalize(far)), far, rtol=2e-6, atol=2e-5)


def test_any_leading_axes(values):
    stats = normalize.fit_stats_of(values)
    np.testing.assert_array_equal(stats.normalize(values.reshape(40, 50, 3)).reshape(-1, 3), stats.normalize(values))
    np.testing.assert_array_equal(stats.normalize(values[0]), stats.normalize(values)[0])


def test_a_constant_dimension_is_zero_comes_back_and_is_named(values, np_rng):
    values[:, 1] = 7 + np_rng.uniform(-1, 1, len(values)) * EPSILON / 4
    with pytest.warns(UserWarning, match="action: near-constant dimensions are mapped to 0: roll"):
        stats = normalize.fit_stats_of(values, ["x", "roll", "z"], "action")
    z = stats.normalize(values + np.array([0, 1e3, 0]))
    assert stats.constant.tolist() == [False, True, False]
    assert (z[:, 1] == 0).all() and (z[:, 0] != 0).any()
    np.testing.assert_allclose(stats.unnormalize(z + 5)[:, 1], 7, atol=EPSILON)


def test_a_dimension_that_rarely_moves_keeps_its_moves(values):
    values[:, 1] = 0
    values[5, 1] = -0.4
    values[6, 1] = 0.6
    with pytest.warns(UserWarning, match="scaled by min and max: roll"):
        stats = normalize.fit_stats_of(values, ["x", "roll", "z"])
    z = stats.normalize(values)[:, 1]
    assert z.min() == -1 and z.max() == 1
    np.testing.assert_allclose(stats.unnormalize(stats.normalize(values))[:, 1], values[:, 1], atol=1e-6)


def test_an_ordinary_fit_warns_of_nothing(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalize.fit_stats_of(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named(values, bad):
    stats = normalize.fit_stats_of(values)
    values[17, 2] = bad
    with pytest.raises(ValueError, match=f"action: {bad} in dimension z, row 17"):
        normalize.fit_stats_of(values, ["x", "y", "z"], "action")
    for way in (stats.normalize, stats.unnormalize):
        with pytest.raises(ValueError, match="in dimension 2, row 17"):
            way(values)


def test_wrong_shapes(values):
    with pytest.raises(ValueError, match=r"got shape \(2000, 2\), expected \[..., 3\]"):
        normalize.fit_stats_of(values).normalize(values[:, :2])
    for shape in ((0, 3), (5,)):
        with pytest.raises(ValueError, match="expected"):
            normalize.fit_stats_of(np.zeros(shape))


def test_the_file_is_openpis_and_reads_back(tmp_path, values):
    stats = {"state": normalize.fit_stats_of(values), "actions": normalize.fit_stats_of(values * 2)}
    normalize.save_stats(tmp_path / "norm_stats.json", stats)
    raw = json.loads((tmp_path / "norm_stats.json").read_text())
    assert set(raw) == {"norm_stats"} and set(raw["norm_stats"]) == {"state", "actions"}
    assert {"mean", "std", "q01", "q99"} <= set(raw["norm_stats"]["state"])
    back = normalize.load_stats(tmp_path / "norm_stats.json")
    np.testing.assert_array_equal(back["actions"].normalize(values), stats["actions"].normalize(values))


def test_a_file_of_openpi_without_quantiles_or_extremes():
    entry = {"mean": [0.0], "std": [1.0], "q01": [-2.0], "q99": [2.0]}
    assert normalize.stats_from_json({"norm_stats": {"state": entry}})["state"].normalize(np.array([1.0])) == 0.5
    stats = normalize.stats_from_json({"norm_stats": {"state": entry | {"q01": None, "q99": None}}})["state"]
    with pytest.raises(ValueError, match="no q01 and q99"):
        stats.normalize(np.array([1.0]))
    assert isinstance(stats, NormStats)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "expected an object with the key 'norm_stats'"),
        ({"norm_stats": {"state": {"mean": [0]}}}, "'state': expected an object with mean, std"),
        ({"norm_stats": {"state": {"mean": ["a"], "std": [1]}}}, "expected lists of numbers"),
        ({"norm_stats": {"state": {"mean": [0, 1], "std": [1]}}}, r"std has shape \(1,\), expected \(2,\)"),
        ({"norm_stats": {"state": {"mean": [float("nan")], "std": [1]}}}, "finite numbers"),
    ],
)
def test_bad_files_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        normalize.stats_from_json(raw, "here")
