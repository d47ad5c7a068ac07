"""Every attack of `benchmarks/attacks`, a few seeded times: never a wrong answer.

`benchmarks/reliability.py` makes many more tries; `make test-all` runs it every night with new seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests import shapes

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of a source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
from attacks.base import run_attack  # noqa: E402
from reliability import list_attacks  # noqa: E402

ATTACKS = list_attacks()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("name", list(ATTACKS))
@torch.no_grad()
def test_an_attack_never_gives_a_wrong_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Attacks pass what no signature allows: farkv must refuse it, not the checks that only tests have.
    monkeypatch.setattr(shapes.Calls, "limit", 0)
    attack = ATTACKS[name]
    found = run_attack(attack, attack.quick)
    assert found.wrong == 0, f"{attack.says}: wrong with seeds {found.seeds}"
