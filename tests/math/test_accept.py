"""What stands is distributed as full attention's own tokens, whatever the drafts are drawn from."""

from __future__ import annotations

import pytest
import torch

from farkv.math.accept import Drafted, Noise, settle

DRAWS = 20_000
# Of the chi-square distribution with 7 degrees of freedom: exceeded by chance once in a hundred thousand.
BOUND = 38.0


def make_log_p(seed: int, scale: float = 1.5) -> torch.Tensor:
    return (scale * torch.randn(8, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def measure_chi_square(tokens: list[int], log_p: torch.Tensor) -> float:
    seen = torch.bincount(torch.tensor(tokens), minlength=8).double()
    expected = log_p.double().exp() * len(tokens)
    return float(((seen - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("draft", ["near", "far", "copied", "none"])
def test_tokens_that_stand_are_distributed_as_full_attentions(draft: str) -> None:
    log_p = make_log_p(1)
    log_q = (log_p + 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(3))).log_softmax(-1)
    log_q = make_log_p(2, 2.5) if draft == "far" else log_q
    tokens, kept = [], 0
    for position in range(DRAWS):
        noise, mine = Noise(11), None
        if draft == "copied":
            mine = Drafted(position % 8, None)
        elif draft != "none":
            mine = Drafted(noise.draw(log_q, position), log_q)
        tokens.append(settle(mine, log_p, noise, position))
        kept += mine is not None and tokens[-1] == mine.token
    assert measure_chi_square(tokens, log_p) < BOUND
    if draft == "near":
        assert kept > 0.85 * DRAWS
    elif draft != "none":
        assert 0 < kept < 0.85 * DRAWS


def test_the_bound_tells_another_distribution() -> None:
    noise, log_q = Noise(11), (make_log_p(1) + 0.1 * torch.arange(8)).log_softmax(-1)
    assert measure_chi_square([noise.draw(log_q, i) for i in range(DRAWS)], make_log_p(1)) > BOUND


def test_neighbouring_positions_and_rows_are_not_alike() -> None:
    log_p = torch.zeros(8).log_softmax(-1)
    tokens = [[Noise(4, row).draw(log_p, i) for i in range(4000)] for row in (0, 1)]
    pairs = torch.zeros(8, 8)
    for a, b in (*zip(tokens[0], tokens[0][1:], strict=False), *zip(*tokens, strict=True)):
        pairs[a, b] += 1
    expected = pairs.sum() / 64
    # 63 degrees of freedom.
    assert float(((pairs - expected) ** 2 / expected).sum()) < 125


def test_without_a_seed_the_likeliest_token_stands() -> None:
    log_p, noise = make_log_p(1), Noise(None)
    best = int(log_p.argmax())
    for token in range(8):
        assert settle(Drafted(token, make_log_p(2)), log_p, noise, 5) == best


def test_a_draft_from_the_same_distribution_always_stands() -> None:
    log_p, noise = make_log_p(1), Noise(8)
    for position in range(500):
        token = noise.draw(log_p, position)
        assert settle(Drafted(token, log_p), log_p, noise, position) == token


def test_a_token_that_full_attention_rules_out_never_stands() -> None:
    log_p = make_log_p(1).index_fill(0, torch.tensor([2, 5]), -torch.inf).log_softmax(-1)
    log_q = torch.zeros(8).log_softmax(-1)
    for position in range(2000):
        noise = Noise(3)
        assert settle(Drafted(noise.draw(log_q, position), log_q), log_p, noise, position) not in (2, 5)
