"""The methods that can be compared, by name: a config per fraction, and further options of `attach`.

They are those of the table (`farkv.methods.table`), and variants of some.
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
    """One method: how to make its config for a fraction, and its properties.

    evicts: the records kept after the text are all that later questions can read.  reads_keys: selection reads every
    key, so it is an upper bound that saves nothing.  far: near memory is a separate tier, so records are selected one
    layer ahead.  plan: the lever whose per-layer shares come from the model's profile.  grows: as published, decoded
    tokens are kept in addition, so the fraction applies to the text only.  profiled: it needs a profile; others
    use one if there is one.  aware: the first question is read with the text, before anything is evicted.
    """

    make: Callable[[float], Method]
    evicts: bool = False
    reads_keys: bool = False
    far: bool = False
    plan: str | None = None
    grows: bool = False
    profiled: bool = False
    aware: bool = False


# One layer ahead: with the top-up by the true query, and without; from the paper's hidden state.
AHEAD: dict[str, dict[str, Any]] = {
    "infinigen-far": {},
    "infinigen-far-attn": {"source": "attn"},
    "infinigen-ahead": {"top_up": 0},
    "infinigen-ahead-attn": {"top_up": 0, "source": "attn"},
}


def make_ahead(options: dict[str, Any], fraction: float) -> Method:
    """Make InfiniGen's config where records are chosen one layer ahead."""
    return InfiniGen(fraction=fraction, **options)


# Further variants of the table's methods.
VARIANTS: dict[str, dict[str, Known]] = {
    "infinigen": {
        # By the true query on any device: what the index finds. On a GPU the method chooses one layer ahead (-far).
        "infinigen": Known(lambda f: InfiniGen(fraction=f, source="query")),
        # The best of every head, nothing drawn; reads that vary from head to head and step to step; the index in half
        # the bytes, which in float32 is as many bits as in half precision; and in even steps, as it was until decision
        # 20.
        "infinigen-top": Known(lambda f: InfiniGen(fraction=f, source="query", sampled=False)),
        "infinigen-vary": Known(lambda f: InfiniGen(fraction=f, source="query", burst=4)),
        "infinigen-half": Known(lambda f: InfiniGen(fraction=f, source="query", index_share=1 / 64)),
        "infinigen-steps": Known(lambda f: InfiniGen(fraction=f, source="query", index_bits=4)),
        **{name: Known(partial(make_ahead, options), far=True) for name, options in AHEAD.items()},
        **{f"{n}-steps": Known(partial(make_ahead, {**o, "index_bits": 4}), far=True) for n, o in AHEAD.items()},
        "infinigen-plan": Known(lambda f: InfiniGen(), plan="fetch"),
        "infinigen-paper": Known(lambda f: InfiniGen(fraction=f, paper=True)),
    },
    "xkv": {
        "xkv-uniform": Known(lambda f: XKV(fraction=f, rule="uniform"), evicts=True),
        "xkv-pyramid": Known(lambda f: XKV(fraction=f, rule="pyramid"), evicts=True),
        "xkv-plan": Known(lambda f: XKV(), evicts=True, plan="keep"),
        "xkv-paper": Known(lambda f: XKV(fraction=f, paper=True), evicts=True, grows=True),
    },
}
# Display order: ours, other selectors, then evictors.
ORDER = ("full", "infinigen", "pages", "lowbit", "oracle", "window", "random", "xkv", "snapkv", "pyramidkv", "h2o")


def list_methods() -> dict[str, Known]:
    """Return every method of the table, followed by its variants; methods not in ORDER come last.

    What evicts also has a variant, `NAME-aware`, that has read the first question before.
    """
    found: dict[str, Known] = {}
    for name in sorted(TABLE, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        row = TABLE[name]
        make = partial(make_full if name == FULL else make_config, row.config)
        found[name] = Known(make, evicts=row.evictor is not None, reads_keys=row.reads_keys)
        found |= VARIANTS.get(name, {})
    aware = {f"{name}-aware": known._replace(aware=True) for name, known in found.items() if known.evicts}
    return found | aware


def make_config(config: type[Any], fraction: float) -> Method:
    """Make a method's config for a fraction."""
    return config(fraction=fraction)


def make_full(config: type[Any], fraction: float) -> Method:
    """Make the reference's config: it reads everything, whatever the fraction."""
    return config()


def find_method(name: str) -> Known:
    """Return a method by name.

    Raises:
        ConfigError: the name is unknown.
    """
    methods = list_methods()
    if name not in methods:
        raise ConfigError(f"method: expected one of {', '.join(methods)}, got {name!r}")
    return methods[name]


def make_method(name: str, fraction: float) -> Method:
    """Return a method's config for a fraction; a planned method's config ignores it.

    Raises:
        ConfigError: the method is unknown, or does not support this fraction.
    """
    check_fraction(fraction)
    return find_method(name).make(fraction)


def attach_options(known: Known, profile: Any, fraction: float, n_bytes: int) -> dict[str, Any]:
    """Return the options of `attach` in addition to the method.

    Args:
        profile: the model's profile, with curves and losses where the method needs a plan.
        n_bytes: size of the full cache; the near limit is set well above it.

    Raises:
        ConfigError, ProfileError: the method needs a plan, and there is no profile with measured losses.
    """
    options: dict[str, Any] = {}
    if known.profiled and (profile is None or not profile.has_skew):
        raise ConfigError("profile: this method needs one with skews; create it with farkv profile, or drop the method")
    if known.far:
        options["near"] = 4 * n_bytes + 2**28
    if known.plan is not None:
        if profile is None:
            raise ConfigError(
                "plan: this method needs a profile for the layers' shares, and the model's folder has none; create one "
                "with farkv profile --losses 8, or drop the method"
            )
        # Imported here because methods without a plan do not need it.
        from farkv.calibrate.planning import PlanBudget, Sharing, make_plan

        lever: Any = known.plan
        options["plan"] = make_plan(profile, PlanBudget(ratio=fraction), (lever,), Sharing(rule="loss"))
    return options
