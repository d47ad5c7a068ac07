"""The methods that can be compared, by name: a config per fraction, and what else `attach` is told.

They are the table's (`farkv.methods.table`), and variants of some.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from farkv.config import check_fraction
from farkv.errors import ConfigError
from farkv.methods import METHODS as TABLE
from farkv.methods import XKV, InfiniGen, Method

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


# What of the table's methods is compared besides, as it stands there.
VARIANTS: dict[str, dict[str, Known]] = {
    "infinigen": {
        "infinigen-far": Known(lambda f: InfiniGen(fraction=f), far=True),
        "infinigen-plan": Known(lambda f: InfiniGen(), plan="fetch"),
        "infinigen-paper": Known(lambda f: InfiniGen(fraction=f, paper=True)),
    },
    "xkv": {
        "xkv-plan": Known(lambda f: XKV(), evicts=True, plan="keep"),
        "xkv-paper": Known(lambda f: XKV(fraction=f, paper=True), evicts=True, grows=True),
    },
}
# In the order in which results are shown: ours, other selectors, then what evicts.
ORDER = ("full", "infinigen", "pages", "lowbit", "oracle", "window", "random", "xkv", "snapkv", "pyramidkv", "h2o")


def list_methods() -> dict[str, Known]:
    """Return every method of the table with its variants; what was added to the table comes last."""
    found: dict[str, Known] = {}
    for name in sorted(TABLE, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        row = TABLE[name]
        make = partial(make_full if name == FULL else make_config, row.config)
        found[name] = Known(make, evicts=row.evictor is not None, reads_keys=row.reads_keys)
        found |= VARIANTS.get(name, {})
    return found


def make_config(config: type[Any], fraction: float) -> Method:
    """Make a method's config for a fraction."""
    return config(fraction=fraction)


def make_full(config: type[Any], fraction: float) -> Method:
    """Make the reference's config: it reads all, whatever the fraction of the methods beside it."""
    return config()


def find_method(name: str) -> Known:
    """Return a method by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    methods = list_methods()
    if name not in methods:
        raise ConfigError(f"method: expected one of {', '.join(methods)}, got {name!r}")
    return methods[name]


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
        from farkv.calibrate.planning import PlanBudget, Sharing, make_plan

        lever: Any = known.plan
        options["plan"] = make_plan(profile, PlanBudget(ratio=fraction), (lever,), Sharing(rule="loss"))
    return options
