"""One look per method in all figures: colour, line, marker.

In: methods, and which of them see the query. Out: looks, and their CSS. Colours are told apart by people who do not see
red or green; whoever sees none has the markers. A solid line and a full marker: chosen anew for every query; a dashed
line and a hollow marker: blind to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from farkv.evals.cells import FULL

# In light, in dark, marker.
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
# Methods of others, `kvpress:NAME`, in the order of their names.
OTHERS = [
    ("#4b7410", "#a8d765", "circle"),
    ("#00707f", "#57cbdc", "diamond"),
    ("#8a3ffc", "#be95ff", "square"),
    ("#9f1853", "#ff8bbd", "cross"),
    ("#5a5200", "#cfc35c", "triangle"),
]


class Look(NamedTuple):
    """How one method is drawn: its CSS class, two colours, marker; dashed and hollow unless it sees the query."""

    method: str
    name: str
    light: str
    dark: str
    marker: str
    aware: bool


def order_methods(methods: Iterable[str]) -> list[str]:
    """Return methods in the order of `KNOWN`, those of others after them by name."""
    places = {method: i for i, method in enumerate(KNOWN)}
    return sorted(methods, key=lambda method: (places.get(method, len(places)), method))


def choose_looks(methods: Iterable[str], aware: Iterable[str]) -> dict[str, Look]:
    """Return the look of every method.

    Args:
        methods: names, in any order.
        aware: those whose choice sees the query.
    """
    methods = order_methods(methods)
    others = sorted(method for method in methods if method not in KNOWN)
    seen = set(aware)
    looks = {}
    for i, method in enumerate(methods):
        colours = KNOWN.get(method) or OTHERS[others.index(method) % len(OTHERS)]
        looks[method] = Look(method, f"m{i}", *colours, method in seen)
    return looks


def write_css(looks: Sequence[Look]) -> str:
    """Return the colour of every look in light and dark, and what its box in the legend does."""
    light = "".join(f".{look.name}{{--c:{look.light}}}\n" for look in looks)
    dark = "".join(f".{look.name}{{--c:{look.dark}}}\n" for look in looks)
    hide = "".join(
        f"body:has(#show-{look.name}:not(:checked)) .curve.{look.name}{{display:none}}\n"
        f"body:has(label.{look.name}:hover) .curve:not(.{look.name}){{opacity:.13}}\n"
        for look in looks
    )
    return f"{light}@media screen and (prefers-color-scheme:dark){{\n{dark}}}\n{hide}"


def draw_marker(look: Look, x: float, y: float, size: float = 4.0) -> str:
    """Return the path data of a marker around a point."""
    s = size
    match look.marker:
        case "square":
            return f"M{x - s:.1f} {y - s:.1f}h{2 * s:.1f}v{2 * s:.1f}h{-2 * s:.1f}z"
        case "diamond":
            s *= 1.3
            return f"M{x:.1f} {y - s:.1f}l{s:.1f} {s:.1f}l{-s:.1f} {s:.1f}l{-s:.1f} {-s:.1f}z"
        case "triangle":
            s *= 1.15
            return f"M{x:.1f} {y - s:.1f}l{s:.1f} {2 * s:.1f}h{-2 * s:.1f}z"
        case "down":
            s *= 1.15
            return f"M{x:.1f} {y + s:.1f}l{s:.1f} {-2 * s:.1f}h{-2 * s:.1f}z"
        case "cross":
            return f"M{x - s:.1f} {y - s:.1f}l{2 * s:.1f} {2 * s:.1f}M{x - s:.1f} {y + s:.1f}l{2 * s:.1f} {-2 * s:.1f}"
        case _:
            return f"M{x - s:.1f} {y:.1f}a{s:.1f} {s:.1f} 0 1 0 {2 * s:.1f} 0a{s:.1f} {s:.1f} 0 1 0 {-2 * s:.1f} 0z"
