"""The demo model that ships with the package, and prompts for it, so that a first run needs no download."""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
