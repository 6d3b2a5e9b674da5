"""The statistics a LeRobot data set carries: min, max, mean, std, count and true quantiles of every feature."""

import warnings

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def numeric_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std, count and quantiles per dimension, float64, of [T, D] or [T] (one dimension). NaN and
    infinity are left out; a dimension that holds nothing else gets NaN."""
    # float32 sums of a million values lose the third digit.
    rows = values.reshape(len(values), -1).astype(np.float64)
    if not np.isfinite(rows).all():
        return _finite_stats(np.where(np.isfinite(rows), rows, np.nan))

    quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)

    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


def _finite_stats(rows: np.ndarray) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a dimension without any number is NaN, as promised
        quantiles = np.nanquantile(rows, list(QUANTILES.values()), axis=0)
        return {
            "min": np.nanmin(rows, axis=0),
            "max": np.nanmax(rows, axis=0),
            "mean": np.nanmean(rows, axis=0),
            "std": np.nanstd(rows, axis=0),
            "count": np.array([len(rows)]),
            **dict(zip(QUANTILES, quantiles, strict=True)),
        }


def histogram_stats(counts: np.ndarray) -> dict[str, np.ndarray]:
    """min, max, mean, std and quantiles in [0, 1], each [3, 1, 1] as LeRobot stores them, from int64 [3, 256]."""
    values = np.arange(256) / 255
    total = counts.sum(1, keepdims=True)
    # From counts of the 256 values: exact, without a second look at any picture.
    mean = (counts * values).sum(1, keepdims=True) / total
    variance = (counts * (values - mean) ** 2).sum(1, keepdims=True) / total
    seen, cumulative = counts > 0, counts.cumsum(1)
    stats = {
        "min": values[seen.argmax(1)],
        "max": values[255 - seen[:, ::-1].argmax(1)],
        "mean": mean[:, 0],
        "std": np.sqrt(variance[:, 0]),
    }
    stats |= {name: values[(cumulative >= q * total).argmax(1)] for name, q in QUANTILES.items()}

    return {name: value.reshape(3, 1, 1) for name, value in stats.items()}
