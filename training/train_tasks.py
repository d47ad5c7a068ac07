"""Train the demo model further, on the tasks of `farkv eval`: several per text, all asked at the end.

    python training/train_tasks.py --out runs/tasks --minutes 60     # start, or go on from last.pt
    python training/train_tasks.py --out runs/tasks --export         # only write the fp16 weights

In: the shipped demo model, the standard library's sources. Out: checkpoints, a log, and at the end
`runs/model_tasks/`: weights that are not shipped, because a run of an hour was not enough (README.md).
Half of the samples hold tasks; the other half is what the demo model learned before.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from train_demo import PACKAGE, Phase, Run, parse_arguments, start


def mix(recall: float, code: float, tasks: float, counted: float) -> dict[str, float]:
    return {"copy": 0.01, "recall": recall, "code": code, "tasks": tasks, "counted": counted}


# No phase ends before its share of the minutes: `enough` is out of reach.
PHASES = (
    Phase(512, 0.10, 0, 2.0, mix(0.15, 0.10, 0.70, 0.04), 0.7, 0.0),
    Phase(1024, 0.28, 0, 2.0, mix(0.20, 0.10, 0.65, 0.04), 0.75, 0.0),
    Phase(2048, 0.50, 0, 2.0, mix(0.20, 0.10, 0.65, 0.04), 0.85, 0.0),
    Phase(4096, 0.72, 0, 2.0, mix(0.25, 0.10, 0.60, 0.04), 0.9, 0.0),
    Phase(8192, 1.0, 0, 2.0, mix(0.30, 0.08, 0.58, 0.03), 0.9, 0.0),
)


class TaskRun(Run):
    """A run that begins with the shipped demo model's weights."""

    phases = PHASES
    folder = Path("runs/model_tasks")

    def __init__(self, args, rank: int = 0):
        super().__init__(args, rank)
        if self.total == 0:
            weights = load_file(PACKAGE / "model.safetensors")
            missing, extra = self.model.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
            assert not extra, extra
            assert missing == ["lm_head.weight"], missing  # tied


def main() -> None:
    start(parse_arguments(), TaskRun)


if __name__ == "__main__":
    main()
