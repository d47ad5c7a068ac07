"""HTML and SVG elements whose texts are escaped by construction.

In: names, texts, attributes. Out: `Html`. A plain string is text and is escaped; only an `Html` is put in as it is, so
an answer of a model can say `<script>` and be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

VOID = {"meta", "input", "br", "hr", "col", "path", "line", "rect", "circle", "image"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return a value as HTML text; what is HTML already stays as it is."""
    return value if isinstance(value, Html) else Html(escape(str(value), quote=True))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Return texts and elements as one."""
    return Html(text(between).join(text(part) for part in parts))


def keep(said: str) -> str:
    """Return a sentence in which numbers stay on one line with their units."""
    return re.sub(r"(?<=\d) (?=%|K\b|points\b)", "\u00a0", said)


def break_name(method: str) -> Html:
    """Return a method's name, which may go on in the next line after a colon."""
    return join(method.split(":"), Html(":<wbr>"))


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """Return one element.

    Args:
        name: of the element.
        children: texts and elements; a plain string is escaped.
        attributes: None and False leave one out, True gives it no value; `_` stands for `-`, and a last one is cut,
            so that `class_` and `stroke_width` can be written.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        named = key.rstrip("_").replace("_", "-")
        shown = f"{value:.5g}" if isinstance(value, float) else str(value)
        written.append(f" {named}" if value is True else f' {named}="{escape(shown, quote=True)}"')
    opened = f"<{name}{''.join(written)}"
    if name in VOID and not children:
        return Html(f"{opened}/>")
    return Html(f"{opened}>{join(children)}</{name}>")
