"""One look per method in all figures: colour, line, marker.

In: methods, and which of them see the query. Out: looks, whose CSS is in `page.html`. The colours are distinguishable
with colour blindness, the markers without any colour. Solid line, filled marker: records are selected for each query;
dashed line, hollow marker: they are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from farkv.evals.cells import FULL, OURS

# SVG paths around the origin.
MARKERS = {
    "none": "",
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-4-4h8v8h-8z",
    "diamond": "M0-5.2l5.2 5.2l-5.2 5.2l-5.2-5.2z",
    "triangle": "M0-4.6l4.6 9.2h-9.2z",
    "down": "M0 4.6l4.6-9.2h-9.2z",
    "cross": "M-4-4l8 8m0-8l-8 8",
}
# Colour in light mode, colour in dark mode, marker.
KNOWN = {
    FULL: ("#3d4451", "#c9d1dc", "none"),
    "infinigen": ("#0b5fc0", "#62acff", "circle"),
    "infinigen-far": ("#2a8fc9", "#8fd0f7", "down"),
    "infinigen-plan": ("#4a5fd0", "#a0aeff", "square"),
    "infinigen-paper": ("#5b6b8c", "#a9b8d6", "diamond"),
    "pages": ("#00806a", "#35c9a4", "triangle"),
    "lowbit": ("#977000", "#e3bd45", "square"),
    "oracle": ("#6a717c", "#9aa3b0", "diamond"),
    "xkv": ("#c6450b", "#ff9159", "circle"),
    "xkv-plan": ("#a85a00", "#f0a860", "square"),
    "xkv-paper": ("#b5744a", "#dba987", "diamond"),
    "snapkv": ("#b03a86", "#f191cb", "triangle"),
    "pyramidkv": ("#7445ad", "#c09bee", "down"),
    "h2o": ("#8f2740", "#ee8497", "square"),
    "window": ("#74624c", "#c2ac92", "down"),
    "random": ("#737b86", "#98a1ad", "cross"),
}
# For other methods, such as `kvpress:NAME`, in order of name.
OTHERS = [
    ("#4b7410", "#a8d765", "circle"),
    ("#00707f", "#57cbdc", "diamond"),
    ("#8a3ffc", "#be95ff", "square"),
    ("#9f1853", "#ff8bbd", "cross"),
    ("#5a5200", "#cfc35c", "triangle"),
]


class Look(NamedTuple):
    """How one method is drawn: its CSS class, two colours, the path of its marker, whether it sees the query."""

    method: str
    name: str
    light: str
    dark: str
    marker: str
    aware: bool
    bound: bool = False

    @property
    def style(self) -> str:
        """The CSS classes of its line and markers: an upper bound is dotted, ours is thicker."""
        kind = "bound" if self.bound else "aware" if self.aware else "blind"
        return f"{self.name} {kind} ours" if self.method == OURS else f"{self.name} {kind}"


def order_methods(methods: Iterable[str]) -> list[str]:
    """Return methods in the order of `KNOWN`, then the others by name."""
    places = {method: i for i, method in enumerate(KNOWN)}
    return sorted(methods, key=lambda method: (places.get(method, len(places)), method))


def choose_looks(methods: Iterable[str], aware: Iterable[str], bounds: Iterable[str] = ()) -> dict[str, Look]:
    """Return the look of every method.

    Args:
        methods: names, in any order.
        aware: those whose selection sees the query.
        bounds: those that read all keys to select.
    """
    methods, aware, bounds = order_methods(methods), set(aware), set(bounds)
    others = [method for method in methods if method not in KNOWN]
    looks = {}
    for i, method in enumerate(methods):
        light, dark, marker = KNOWN.get(method) or OTHERS[others.index(method) % len(OTHERS)]
        looks[method] = Look(method, f"m{i}", light, dark, MARKERS[marker], method in aware, method in bounds)
    return looks
