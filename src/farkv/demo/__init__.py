"""The demo model inside the package, and prompts for it: no download is needed for a first run."""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
