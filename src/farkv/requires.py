"""What must be installed in which release: looked at before anything of it is imported, so that the reason is told."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from farkv.errors import ConfigError

# As in pyproject.toml.
LEAST = {"torch": (2, 8), "transformers": (5, 16)}


def check_versions() -> None:
    """Raise ConfigError where a package is missing, or older than what farkv was tried with. Cost: milliseconds."""
    for name, least in LEAST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
        if numbers < least:
            wanted = ".".join(map(str, least))
            raise ConfigError(f"farkv: needs {name} >= {wanted}, found {found}: pip install -U {name}")
