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
        ({"state": {}}, "expected an object with the key 'norm_stats'.*got 'state'"),
        ({"norm_stats": {"state": [1]}}, r"'state' is \[1\], expected an object"),
        ({"norm_stats": {"state": {"mean": [0]}}}, "'state': no std; it has mean, expected mean and std"),
        ({"norm_stats": {"state": {"mean": [0], "stdev": [1]}}}, r"no std \(did you mean 'stdev'\?\)"),
        ({"norm_stats": {"state": {"mean": ["a"], "std": [1]}}}, r'mean\[0\] is "a", expected a finite number'),
        ({"norm_stats": {"state": {"mean": ["0.5"], "std": [1]}}}, r'mean\[0\] is "0.5", expected a finite number'),
        ({"norm_stats": {"state": {"mean": [0], "std": [True]}}}, r"std\[0\] is true, expected a finite number"),
        ({"norm_stats": {"state": {"mean": 0, "std": [1]}}}, "mean is 0, expected a list of numbers"),
        ({"norm_stats": {"state": {"mean": [[0]], "std": [1]}}}, r"mean\[0\] is \[0\], expected a finite number"),
        ({"norm_stats": {"state": {"mean": [0, 1], "std": [1]}}}, "std has 1 numbers, mean has 2"),
        ({"norm_stats": {"state": {"mean": [float("nan")], "std": [1]}}}, r"mean\[0\] is NaN, expected a finite"),
        ({"norm_stats": {"state": {"mean": [0], "std": [float("inf")]}}}, r"std\[0\] is Infinity"),
        ({"norm_stats": {"state": {"mean": [0], "std": [-1]}}}, r"std\[0\] is -1, expected at least 0"),
        (
            {"norm_stats": {"state": {"mean": [0], "std": [1], "q01": [2], "q99": [1]}}},
            r"q01\[0\] is 2, above q99\[0\]",
        ),
        (
            {"norm_stats": {"state": {"mean": [0], "std": [1], "min": [2], "max": [1]}}},
            r"min\[0\] is 2, above max\[0\]",
        ),
    ],
)
def test_bad_files_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        normalize.stats_from_json(raw, "here")


def norm_file(tmp_path, **changes):
    """A file as openpi writes it, of two dimensions, and what a mapping makes of it."""
    entry = {"mean": [1.0, 1.0], "std": [2.0, 2.0], "q01": [-9.0, -9.0], "q99": [9.0, 9.0]} | changes
    kept = {key: value for key, value in entry.items() if value is not None}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": kept, "actions": kept}}))
    return path


def test_the_mappings_normalization_wins_over_the_file(tmp_path):
    path, x = norm_file(tmp_path), np.array([3.0, 3.0])
    sizes = {"state": 2, "actions": 2}
    means = normalize.load_mapped_stats(path, "mean_std", sizes)["actions"]
    quantiles = normalize.load_mapped_stats(path, "quantiles", sizes)["actions"]
    np.testing.assert_allclose(means.normalize(x), 1.0)
    np.testing.assert_allclose(quantiles.normalize(x), 2 * 12 / 18 - 1)
    np.testing.assert_allclose(means.unnormalize(means.normalize(x)), x)


@pytest.mark.parametrize(
    ("changes", "kind", "sizes", "message"),
    [
        ({"kind": "min_max"}, "quantiles", {"state": 2}, "says kind 'min_max', the mapping normalization 'quantiles'"),
        ({"q01": None}, "quantiles", {"state": 2}, 'has no q01, .*write normalization = "mean_std"'),
        ({}, "min_max", {"state": 2}, 'has no min and max.* it has mean, std, q01, q99: .*"quantiles" or "mean_std"'),
        ({}, "quantiles", {"state": 3}, "'state' has 2 dimensions, expected the 3"),
        ({}, "quantiles", {"action": 2}, "no 'action' .did you mean 'actions'"),
    ],
)
def test_a_file_that_contradicts_the_mapping_is_refused_by_name(tmp_path, changes, kind, sizes, message):
    with pytest.raises(ValueError, match=f"norm_stats.json: .*{message}"):
        normalize.load_mapped_stats(norm_file(tmp_path, **changes), kind, sizes)


def test_a_file_that_says_the_same_kind_and_no_state_are_fine(tmp_path):
    path = norm_file(tmp_path, kind="mean_std")
    found = normalize.load_mapped_stats(path, "mean_std", {"state": 0, "actions": 2})
    assert found["state"].dim == 0 and found["actions"].kind == "mean_std"


@pytest.mark.filterwarnings("ignore")
def test_constant_is_relative_to_the_dimensions_own_scale(np_rng):
    noise = np_rng.uniform(-1, 1, (2000, 5))
    scales, centers = np.array([4e-5, 2e-7, 4e-5, 1e-10, 1.0]), np.array([0, 0, 7.0, 0, 0])
    stats = normalize.fit_stats_of(centers + noise * scales)
    # tiny units move; noise beside a large value, and rounding around nothing, do not
    assert stats.constant.tolist() == [False, False, True, True, False]
    np.testing.assert_allclose(np.quantile(stats.normalize(noise * scales)[:, 0], 0.99), 1, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_tiny_units_with_outliers_keep_their_quantiles_and_events_their_size(np_rng):
    values = np_rng.uniform(-4e-5, 4e-5, (2000, 2))
    values[3, 0] = 2e-4  # an outlier of tiny units
    values[3, 1] = 1.0  # an event beside noise
    stats = normalize.fit_stats_of(values)
    assert stats.rarely_moves.tolist() == [False, True]
    assert stats.normalize(values)[3].tolist() == [pytest.approx(5, rel=0.1), pytest.approx(1)]


def test_statistics_of_another_robot_are_told_by_dimension(np_rng):
    values = np_rng.normal(size=(500, 3))
    stats = normalize.fit_stats_of(values)
    assert not normalize.strangers(stats, values * 1.5).any()
    degrees = values * np.array([57.3, 1, 1e-3])  # one in other units, one as it should be, one far too small
    assert normalize.strangers(stats, degrees).tolist() == [True, False, True]
