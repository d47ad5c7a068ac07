"""Full attention through the far store: everything is kept and everything is read."""

from __future__ import annotations

from dataclasses import dataclass

from farkv.config import check_fraction
from farkv.errors import ConfigError
from farkv.methods.base import Selector


@dataclass(frozen=True, kw_only=True)
class Full:
    """Attend to every record: the reference. With a near limit each layer is copied near, in turn, at every step."""

    fraction: float = 1.0

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        if self.fraction != 1.0:
            raise ConfigError(f"fraction: full attention reads all, expected 1.0, got {self.fraction!r}")


class FullSelector(Selector):
    """Reads every record of every layer at every step."""

    def reads_all(self, layer: int) -> bool:
        """Every layer is dense."""
        return True
