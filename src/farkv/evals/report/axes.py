"""Axes of a picture: where a value stands, and which values are named.

In: the least and the largest value. Out: places in a picture, round ticks, the SVG of both axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farkv.evals.report.element import Html, el, join

# Of one power of ten.
ROUND = (1, 2, 5)


@dataclass(frozen=True)
class Axis:
    """A range of values on a range of places; `log` gives equal places to equal ratios."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value stands; what is outside stands at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values on the axis, at most about `most`."""
        return log_ticks(self.low, self.high, most) if self.log else even_ticks(self.low, self.high, most)


def even_ticks(low: float, high: float, most: int) -> list[float]:
    """Return the multiples of a round step from low to high."""
    step = find_step(high - low, most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def find_step(width: float, most: int) -> float:
    """Return the least round step of which at most `most` fit into a width."""
    power = 10.0 ** math.floor(math.log10(width / most))
    return next(step * power for step in (*ROUND, 10) if step * power * most >= width * (1 - 1e-9))


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return 1, 2, 5, 10, 20, ... from low to high; fewer of them where they would be too many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for kept in (ROUND, (1, 3), (1,)):
        ticks = [round(d * 10.0**p, 12) for p in powers for d in kept]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks if len(ticks) > 1 else [low, high]
    return ticks[:: math.ceil(len(ticks) / most)]


def round_range(values: Sequence[float], most: int = 5) -> tuple[float, float]:
    """Return a range of round ends around shares, inside 0 to 1; never empty."""
    low, high = min(values), max(values)
    step = find_step(max(high - low, 0.02), most)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if high - low < step / 2:
        low, high = low - step, high + step
    return (max(0.0, low), min(1.0, high)) if high <= 1 + 1e-9 or low < 1 else (low, high)


def draw_axes(x: Axis, y: Axis, show_x: Callable[[float], str], show_y: Callable[[float], str], most: int) -> Html:
    """Return lines and names of both axes; y grows upward.

    Args:
        x: from left to right.
        y: from the lower edge to the upper one.
        show_x: writes a value of x.
        show_y: writes a value of y.
        most: names on the x axis.
    """
    parts = []
    for value in y.ticks(5):
        place = y.place(value)
        parts.append(el("line", class_="rule", x1=x.start, x2=x.end, y1=place, y2=place))
        parts.append(el("text", show_y(value), class_="tick", x=x.start - 6, y=place + 4, text_anchor="end"))
    for value in x.ticks(most):
        place = x.place(value)
        parts.append(el("line", class_="axis", x1=place, x2=place, y1=y.start, y2=y.start + 4))
        parts.append(el("text", show_x(value), class_="tick", x=place, y=y.start + 17, text_anchor="middle"))
    parts.append(el("line", class_="axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start))
    return join(parts)
