"""The demo models inside the package, and prompts for them: no download is needed for a first run.

`demo` recalls facts from code; `demo-tasks` was trained further, on the tasks of `farkv eval`.
"""

from __future__ import annotations

from pathlib import Path

MODEL_PATH = Path(__file__).parent / "model"
TASKS_PATH = Path(__file__).parent / "model_tasks"
MODELS = {"demo": MODEL_PATH, "demo-tasks": TASKS_PATH}
