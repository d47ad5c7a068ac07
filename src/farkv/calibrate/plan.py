"""The plan: how much of a context each layer may keep, hold near, and fetch per step.

In: shares per layer and lever, or a JSON file. Out: a frozen `Plan`, its file, the ratios that other tools read.
Knows no tensors; `calibrate.planning` makes plans from measured curves. A plan may be written by hand, so it has no
digest; every number of it is bounded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from farkv.config import LEVERS, MOST_COUNT, Lever, is_number, show_value
from farkv.errors import PlanError
from farkv.files import read_file, write_file
from farkv.untrusted import parse_json

FORMAT = "farkv-plan-1"
# A plan of a hundred layers takes 20 KB.
MAX_BYTES = 4 * 2**20
# More than any model has; lists as long as the last number are made of them.
MAX_LAYERS = 2**14
# Rounding may take a sum of shares of mass past 1.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Allocation:
    """One lever's shares: layer i gets `base + shares[i] * t` records per KV head of a context of t tokens.

    Args:
        shares: per layer, in the order of the plan's layers.
        base: records in addition to the share: the window, where the budget does not include it.
        rule: `xkv`, `loss`, `maxmin`, `pyramid`, `uniform`, or `paper` (the mean of the samples' own allocations).
        budget: the requested budget: {"ratio": 0.3}, {"retention": 0.9, "confidence": 0.9}, ...
        retention: per layer, the attention mass that the shares hold in the profile.
        uniform: per layer, the mass that equal shares of the same sum hold.
        losses: measured losses, summed over layers, in nats: of these shares (`planned`), of equal ones (`uniform`) and
            of the rule `loss` (`least`); empty if the profile has none.
    """

    shares: tuple[float, ...]
    base: int
    rule: str
    budget: dict[str, float]
    retention: tuple[float, ...]
    uniform: tuple[float, ...]
    losses: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, most in (("shares", 1.0), ("retention", 1.0 + _ROUNDING), ("uniform", 1.0 + _ROUNDING)):
            numbers: Any = getattr(self, name)
            if not isinstance(numbers, tuple) or not all(is_number(x) and 0 <= x <= most for x in numbers):
                raise PlanError(f"expected {name} in [0, 1], a number for every layer, got {show_value(numbers)}")
        if type(self.base) is not int or not 0 <= self.base <= MOST_COUNT:
            raise PlanError(f"expected a base of 0 or more records, got {show_value(self.base)}")
        if not isinstance(self.rule, str):
            raise PlanError(f"expected the name of a rule, got {show_value(self.rule)}")
        for name in ("budget", "losses"):
            numbers = getattr(self, name)
            named = isinstance(numbers, dict) and all(isinstance(key, str) for key in numbers)
            if not named or not all(is_number(x) and x >= 0 for x in numbers.values()):
                raise PlanError(f"expected {name} as names and numbers of 0 or more, got {show_value(numbers)}")

    @property
    def ratio(self) -> float:
        """The mean share."""
        return sum(self.shares) / len(self.shares)


@dataclass(frozen=True)
class Plan:
    """Every managed layer's share of a context, for one or more levers."""

    identity: dict[str, str]
    layers: tuple[int, ...]
    levers: dict[Lever, Allocation]
    path: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        whole = isinstance(self.identity, dict) and isinstance(self.levers, dict) and isinstance(self.layers, tuple)
        if not whole or not all(isinstance(text, str) for pair in self.identity.items() for text in pair):
            raise PlanError(
                f"plan {self.path or ''}: expected an identity of texts, a tuple of layers and levers by name; create "
                "a new plan: farkv plan"
            )
        rising = sorted({layer for layer in self.layers if type(layer) is int and 0 <= layer < MAX_LAYERS})
        if not rising or list(self.layers) != rising:
            raise PlanError(
                f"plan {self.path or ''}: expected ascending layer numbers, got {show_value(self.layers)}; create a "
                "new plan: farkv plan"
            )
        for lever, allocation in self.levers.items():
            if lever not in LEVERS or not isinstance(allocation, Allocation):
                raise PlanError(
                    f"plan {self.path or ''}: expected allocations of levers {', '.join(LEVERS)}, got "
                    f"{show_value(lever)}: {show_value(allocation)}"
                )
            if len(allocation.shares) != len(self.layers):
                raise PlanError(
                    f"plan {self.path or ''}: lever {lever}: expected {len(self.layers)} shares, one per layer, "
                    f"got {len(allocation.shares)}; create a new plan: farkv plan"
                )
            if not len(allocation.retention) == len(allocation.uniform) == len(self.layers):
                raise PlanError(
                    f"plan {self.path or ''}: lever {lever}: expected {len(self.layers)} numbers in retention and "
                    "uniform, one per layer; create a new plan: farkv plan"
                )
        if not self.levers:
            raise PlanError(
                f"plan {self.path or ''}: expected at least one lever, got none; create a new plan: farkv plan"
            )

    def get(self, lever: Lever) -> Allocation:
        """Return a lever's allocation.

        Raises:
            PlanError: the plan does not have it.
        """
        if lever not in self.levers:
            raise PlanError(
                f"plan {self.path or ''}: has lever {', '.join(self.levers)}, not {lever}; create one that has it: "
                f"farkv plan --lever {lever}"
            )
        return self.levers[lever]

    def check(self, identity: dict[str, str], layers: list[int]) -> None:
        """Raise PlanError unless the plan was made for a model with this identity and these managed layers."""
        for key, expected in identity.items():
            if self.identity.get(key) != expected:
                raise PlanError(
                    f"plan {self.path or ''}: {key} is {self.identity.get(key)!r}, the model's is {expected!r}; "
                    "create one for this model: farkv profile, then farkv plan"
                )
        if list(self.layers) != list(layers):
            raise PlanError(f"plan {self.path or ''}: is for layers {list(self.layers)}, the model's are {layers}")

    def to_kvpress(self) -> list[float]:
        """Return the compression ratios for kvpress's PerLayerCompressionPress: the fraction removed from each layer.

        Layers outside the plan are not compressed; a window in addition to the shares is not counted.
        """
        n_layers = self.identity.get("layers", "0")
        n_layers = int(n_layers) if n_layers.isdecimal() and len(n_layers) < 5 else 0
        removed = [0.0] * max(n_layers, max(self.layers) + 1)
        for layer, share in zip(self.layers, self.get("keep").shares, strict=True):
            removed[layer] = round(1.0 - share, 6)
        return removed

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON types."""
        return {
            "format": FORMAT,
            "identity": self.identity,
            "layers": list(self.layers),
            "levers": {name: asdict(a) for name, a in self.levers.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a reader sees the old file or the whole new one; on StoreError the old one."""
        write_file(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode(), "plan")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: the file does not exist, is damaged, or is not a plan.
        """
        try:
            row = parse_json(read_file(path, MAX_BYTES))
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {show_value(row)}")
            if row.get("format") != FORMAT:
                raise PlanError(f"plan {path}: expected format {FORMAT}, got {show_value(row.get('format'))}")
            check_keys(row, {"format", "identity", "layers", "levers"})
            identity, layers, levers = row["identity"], row["layers"], row["levers"]
            if not (isinstance(identity, dict) and isinstance(layers, list) and isinstance(levers, dict)):
                raise ValueError("expected an identity, a list of layers and levers by name")
        except (OSError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"plan {path}: cannot be read ({error}); create a new plan: farkv plan") from error
        made: dict[Any, Allocation] = {}
        for name, shares in levers.items():
            try:
                made[name] = read_allocation(shares)
            except ValueError as error:
                raise PlanError(
                    f"plan {path}: lever {name[:60]}: cannot be read ({error}); create a new plan: farkv plan"
                ) from error
        return cls(identity, tuple(layers), made, str(path))


def read_allocation(row: Any) -> Allocation:
    """Return an allocation from its JSON object.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {show_value(row)}")
    names = {"shares", "base", "rule", "budget", "retention", "uniform"}
    check_keys(row, names, {"losses"})
    lists = {name: tuple(row[name]) for name in ("shares", "retention", "uniform") if isinstance(row[name], list)}
    return Allocation(**{**row, **lists})


def check_keys(row: dict[str, Any], names: set[str], more: frozenset[str] | set[str] = frozenset()) -> None:
    """Raise ValueError unless an object has these keys, and no others but `more`."""
    if missing := sorted(names - row.keys()):
        raise ValueError(f"expected {', '.join(missing)}, got none")
    if unknown := sorted(row.keys() - names - more):
        raise ValueError(f"expected {', '.join(sorted(names | more))}, got {show_value(unknown)} besides")
