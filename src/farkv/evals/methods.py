"""The methods that can be compared, by name: a config per fraction, and what else `attach` is told.

A rival needs one file in `farkv.methods` and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from farkv.config import (
    H2O,
    XKV,
    Full,
    InfiniGen,
    LowBit,
    Method,
    Oracle,
    Pages,
    PyramidKV,
    Random,
    SnapKV,
    Window,
    check_fraction,
)
from farkv.errors import ConfigError

FULL = "full"


class Known(NamedTuple):
    """One method: its config for a fraction, and how it may be read.

    evicts: what the text's end leaves is all there is for later questions.  reads_keys: its choice reads every key, so
    it is a bound and saves nothing.  far: near memory is a tier of its own, so records are chosen one layer ahead.
    plan: the lever for which each layer's share comes from the model's own profile.  grows: as published, what is
    decoded is kept besides, so the fraction is the text's alone.
    """

    make: Callable[[float], Method]
    evicts: bool = False
    reads_keys: bool = False
    far: bool = False
    plan: str | None = None
    grows: bool = False


METHODS: dict[str, Known] = {
    FULL: Known(lambda f: Full()),
    "infinigen": Known(lambda f: InfiniGen(fraction=f)),
    "infinigen-far": Known(lambda f: InfiniGen(fraction=f), far=True),
    "infinigen-plan": Known(lambda f: InfiniGen(), plan="fetch"),
    "infinigen-paper": Known(lambda f: InfiniGen(fraction=f, paper=True)),
    "pages": Known(lambda f: Pages(fraction=f)),
    "lowbit": Known(lambda f: LowBit(fraction=f)),
    "oracle": Known(lambda f: Oracle(fraction=f), reads_keys=True),
    "window": Known(lambda f: Window(fraction=f)),
    "random": Known(lambda f: Random(fraction=f)),
    "xkv": Known(lambda f: XKV(fraction=f), evicts=True),
    "xkv-plan": Known(lambda f: XKV(), evicts=True, plan="keep"),
    "xkv-paper": Known(lambda f: XKV(fraction=f, paper=True), evicts=True, grows=True),
    "snapkv": Known(lambda f: SnapKV(fraction=f), evicts=True),
    "pyramidkv": Known(lambda f: PyramidKV(fraction=f), evicts=True),
    "h2o": Known(lambda f: H2O(fraction=f), evicts=True),
}


def find_method(name: str) -> Known:
    """Return a method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def make_method(name: str, fraction: float) -> Method:
    """Return a method's config for a fraction; methods whose shares a plan gives have none of their own.

    Raises:
        ConfigError: there is no such method, or it cannot keep to this fraction.
    """
    check_fraction(fraction)
    return find_method(name).make(fraction)


def attach_options(known: Known, profile: Any, fraction: float, n_bytes: int) -> dict[str, Any]:
    """Return what `attach` is told besides the method.

    Args:
        profile: the model's, with curves and losses where the method needs a plan.
        n_bytes: of the full cache: a near limit above it never refuses.

    Raises:
        ConfigError, ProfileError: the method needs a plan, and there is no profile with measured losses.
    """
    options: dict[str, Any] = {}
    if known.far:
        options["near"] = 4 * n_bytes + 2**28
    if known.plan is not None:
        if profile is None:
            raise ConfigError(
                "plan: this method takes each layer's share from a profile, and the model has none beside its weights; "
                "make it: farkv profile --losses 8, or leave the method out"
            )
        # Planning reads the profile's curves; methods without a plan need not load it.
        from farkv.calibrate.planning import Budget, Choice, make_plan

        lever: Any = known.plan
        options["plan"] = make_plan(profile, Budget(ratio=fraction), (lever,), Choice(rule="loss"))
    return options
