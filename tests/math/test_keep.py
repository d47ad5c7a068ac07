"""Which records of a layer stay: against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.keep import choose_kept, join_scores

B, HEADS = 2, 2


@given(
    n_rows=st.integers(1, 60), n_keep=st.integers(0, 70), n_recent=st.integers(0, 70), seed=st.integers(0, 99),
    spare=st.integers(0, 3),
)  # fmt: skip
def test_kept_records_are_those_of_a_plain_loop(n_rows: int, n_keep: int, n_recent: int, seed: int, spare: int) -> None:
    torch.manual_seed(seed)
    recent = min(n_recent, n_rows)
    old = n_rows - recent
    scores = torch.rand(B, HEADS, old + min(spare, recent))
    scores[..., :1] = torch.inf
    positions, kept = choose_kept(scores, n_rows, n_keep, n_recent)
    n_old = min(max(n_keep - recent, 0), old)
    assert positions.shape == kept.shape == (B, HEADS, n_old + recent)
    for b in range(B):
        for h in range(HEADS):
            row = scores[b, h, :old].tolist()
            best = sorted(sorted(range(old), key=lambda i: -row[i])[:n_old])
            assert positions[b, h].tolist() == best + list(range(old, n_rows))
            expected = [0.0 if row[i] == float("inf") else row[i] for i in best] + [0.0] * recent
            assert kept[b, h].tolist() == pytest.approx(expected)


def test_scores_remember_the_best_score() -> None:
    new, old = torch.rand(B, HEADS, 5), torch.rand(B, HEADS, 9).bfloat16()
    joined = join_scores(new, old)
    assert torch.equal(joined, torch.maximum(new, old[..., :5].float()))
    assert joined.dtype == torch.float32
