"""The plan: how much of a context each layer may keep, hold near, and fetch per step.

In: shares per layer and lever, or a JSON file. Out: a frozen `Plan`, its file, the ratios that other tools read.
Knows no tensors; `calibrate.planning` makes plans from measured curves.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from farkv.config import LEVERS, Lever
from farkv.errors import PlanError
from farkv.files import read_file, write_file

FORMAT = "farkv-plan-1"


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
        for lever, allocation in self.levers.items():
            if lever not in LEVERS:
                raise PlanError(f"plan {self.path or ''}: expected levers {', '.join(LEVERS)}, got {lever!r}")
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
            if not all(0 <= share <= 1 for share in allocation.shares) or allocation.base < 0:
                raise PlanError(
                    f"plan {self.path or ''}: lever {lever}: expected shares in [0, 1] and a base of 0 or more"
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
        removed = [0.0] * max(int(self.identity.get("layers", 0)), max(self.layers) + 1)
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
            row = json.loads(read_file(path))
            if row.get("format") != FORMAT:
                raise PlanError(f"plan {path}: expected format {FORMAT}, got {row.get('format')!r}")
            levers = {name: read_allocation(a) for name, a in row["levers"].items()}
            return cls(dict(row["identity"]), tuple(int(i) for i in row["layers"]), levers, str(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"plan {path}: cannot be read ({error!r}); create a new plan: farkv plan") from error


def read_allocation(row: dict[str, Any]) -> Allocation:
    """Parse an allocation from its JSON object."""
    numbers = {name: tuple(float(x) for x in row[name]) for name in ("shares", "retention", "uniform")}
    losses = {str(name): float(nats) for name, nats in row.get("losses", {}).items()}
    return Allocation(
        base=int(row["base"]), rule=str(row["rule"]), budget=dict(row["budget"]), losses=losses, **numbers
    )
