"""What an allocation is made of, read and checked: gains, weights, budgets, pages.

In: whatever the caller has. Out: numpy arrays that the allocators can rely on, or a ConfigError. NumPy only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from farkv.config import MOST_COUNT, show_value
from farkv.errors import ConfigError


class PageRange(NamedTuple):
    """From `floor` to `cap` pages per layer, of `unit` tokens each; the last page may be cut off at `n_tokens`."""

    floor: np.ndarray
    cap: np.ndarray
    unit: int
    n_tokens: int

    def count_tokens(self, pages: np.ndarray) -> np.ndarray:
        """Return the tokens that these numbers of pages hold."""
        return np.minimum(pages * self.unit, self.n_tokens)


def read_gains(gains: Any, *, ordered: bool, rank: int = 2) -> np.ndarray:
    """Return gains as a float32 or float64 array of this rank, without a copy where possible, or raise ConfigError."""
    try:
        array = np.asarray(gains)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"gains: numpy cannot read them ({error}); pass gains.detach().float().cpu()") from error
    if array.ndim != rank or 0 in array.shape or array.dtype.kind not in "fiu":
        raise ConfigError(f"gains: expected {rank} axes of real numbers, got {array.dtype} of shape {array.shape}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    rows = array.reshape(-1, array.shape[-1])
    # One pass: the ends of non-increasing rows bound the rest, and NaN fails every comparison.
    falling = ordered and all(bool((row[1:] <= row[:-1]).all()) for row in rows)
    least, most = (rows[:, -1].min(), rows[:, 0].max()) if falling else (rows.min(), rows.max())
    if not (least >= 0 and float(most) <= np.finfo(np.float64).max / rows.shape[1]):
        raise ConfigError(f"gains: expected numbers of at least 0 with finite sums, got from {least} to {most}")
    if ordered and not falling:
        raise ConfigError("gains: expected rows that never increase; sort them, or use rule='knapsack'")
    return array


def read_weights(weights: Any, n_layers: int) -> Float64[np.ndarray, " L"]:
    """Return the layers' weights, ones for None, or raise ConfigError."""
    if weights is None:
        return np.ones(n_layers)
    try:
        array = np.asarray(weights, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"weights: expected {n_layers} positive numbers ({error})") from error
    if array.shape != (n_layers,) or not (np.isfinite(array) & (array > 0)).all():
        raise ConfigError(f"weights: expected {n_layers} positive numbers, got {show_value(weights)}")
    return array


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError unless 0 < value <= 1; numpy's numbers are numbers too."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not real or not 0 < value <= 1:
        raise ConfigError(f"{name}: expected a number in (0, 1], got {show_value(value)}")


def check_one_budget(token_bytes: Any, **budgets: float | None) -> None:
    """Raise ConfigError unless exactly one budget is given, bytes with the bytes of a token."""
    given = [name for name, budget in budgets.items() if budget is not None]
    if len(given) != 1:
        raise ConfigError(f"budget: give exactly one of {', '.join(budgets)}; got {' and '.join(given) or 'none'}")
    if (token_bytes is None) == (given == ["n_bytes"]):
        raise ConfigError(
            f"token_bytes: give it with n_bytes, and only then; got {show_value(token_bytes)} with {given[0]}"
        )


def read_pages(shape: tuple[int, ...], floor: Any, cap: Any, unit: int) -> PageRange:
    """Return the range of whole pages between floor and cap, or raise ConfigError."""
    n_layers, n_tokens = shape
    unit = read_number("unit", unit, 1)
    least, most = -(-read_per_layer("floor", floor, n_layers, 0) // unit), np.full(n_layers, -(-n_tokens // unit))
    if cap is not None:
        most = np.minimum(most, read_per_layer("cap", cap, n_layers, 0) // unit)
    if (least > most).any():
        layer = int((least > most).argmax())
        raise ConfigError(
            f"floor: layer {layer} needs {least[layer]} pages of {unit}, and its cap and row allow {most[layer]}; "
            "lower the floor or raise the cap"
        )
    return PageRange(least, most, unit, n_tokens)


def read_number(name: str, number: Any, least: int = 0) -> int:
    """Return a whole number, or raise ConfigError."""
    return int(read_per_layer(name, number, 1, least)[0])


def read_per_layer(name: str, numbers: Any, n_layers: int, least: int) -> Int64[np.ndarray, " L"]:
    """Return a whole number for every layer, one of one for all or of one each, or raise ConfigError."""
    try:
        array = np.asarray(numbers)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # Of unequal lengths, or not to be read as an array.
        array = np.array("")
    counts = array.dtype.kind in "iu" and array.shape in ((), (n_layers,))
    if not counts or (array < least).any() or (array > MOST_COUNT).any():
        many = "" if n_layers == 1 else f", or one for each of {n_layers} layers"
        raise ConfigError(f"{name}: expected a whole number >= {least}{many}; got {show_value(numbers)}")
    return np.broadcast_to(array, n_layers).astype(np.int64)
