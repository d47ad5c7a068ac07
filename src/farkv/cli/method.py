"""The method that options name. In: names and numbers of the command line. Out: configs, or what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from farkv.config import LEVERS, Lever
from farkv.errors import ConfigError
from farkv.methods import METHODS, XKV, Method
from farkv.methods.table import evicts


class Ask(NamedTuple):
    """The command-line options that choose the method."""

    name: str
    fraction: float | None = None
    paper: bool = False
    retention: float | None = None
    plan: Path | None = None
    levers: tuple[str, ...] = ()


def make_methods(asked: Ask) -> list[Method]:
    """Return the configs of the named method: a selector, XKV, or a selector with XKV for the plan's levers."""
    name, fraction = asked.name, asked.fraction
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    if asked.paper and name not in ("infinigen", "xkv"):
        raise ConfigError(f"--paper: requires --method infinigen or xkv, got --method {name}")
    if asked.retention is not None and name != "xkv":
        raise ConfigError(f"--retention: requires --method xkv, got --method {name}")
    if asked.levers and asked.plan is None:
        raise ConfigError("--lever: selects levers of a plan, and there is no plan; add --plan")
    for lever in asked.levers:
        if lever not in LEVERS:
            raise ConfigError(f"--lever: expected one of {', '.join(LEVERS)}, got {lever!r}")
    levers: tuple[Lever, ...] = tuple(lever for lever in LEVERS if lever in asked.levers)
    if name == "xkv":
        retention = asked.retention
        return [XKV(fraction=fraction, retention=retention, paper=asked.paper, levers=levers or ("keep",))]
    options: dict[str, Any] = {} if fraction is None else {"fraction": fraction}
    if name == "infinigen":
        options["paper"] = asked.paper
    xkv: list[Method] = [XKV(levers=levers)] if levers else []
    return [METHODS[name].config(**options), *xkv]


def check_exact(methods: list[Method], *, exact: bool, verify: int, evict: str) -> None:
    """Raise ConfigError where exact generation is asked for with what it cannot be combined with."""
    if not exact:
        return
    if any(evicts(method) for method in methods) or evict != "refuse":
        raise ConfigError("--exact: drafts are verified by reading all, but this method or --evict evicts; drop one")
    if verify:
        raise ConfigError("--exact: every token is full attention's, so there is nothing to --verify; drop one")
