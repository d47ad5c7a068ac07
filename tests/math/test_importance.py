"""Scores of records and the curves made of them, against loops over queries in float64."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farkv.errors import CacheStateError, ConfigError
from farkv.math import importance
from farkv.math.importance import (
    MOMENT_QUERIES,
    SCORERS,
    Observed,
    Scorer,
    measure_spread,
    observe_queries,
    score_records,
    sort_gains,
)
from farkv.math.logits import Logits

B, HKV, S, W, D, DV = 2, 2, 41, 4, 8, 6
FORM = Logits(D**-0.5, None)


def make(
    groups: int = 3, s: int = S, w: int = W, dtype: torch.dtype = torch.float32
) -> tuple[Observed, Tensor, Tensor]:
    """Queries and keys of a few sharp weights; K and V are strided views, as of a cache with room to grow."""
    queries = torch.randn(B, HKV * groups, max(2 * s, 2), D).to(dtype) * 2
    k = torch.randn(B, s + 3, HKV, D).to(dtype).transpose(1, 2)[:, :, :s]
    v = torch.randn(B, s + 3, HKV, DV).to(dtype).transpose(1, 2)[:, :, :s]
    return observe_queries(queries, w, "expected", None), k, v


def pad(h: int, s: int = S) -> Tensor:
    """Left padding of the second sequence; where heads differ, other records are missing too."""
    visible = torch.ones(B, h, s, dtype=torch.bool)
    visible[1, :, :5] = False
    if h > 1:
        visible[:, :, 5 : s - W] &= torch.rand(B, h, s - W - 5) > 0.2
    return visible


def weigh(window: Tensor, k: Tensor, visible: Tensor | None, form: Logits, dtype: torch.dtype) -> Tensor:
    """Softmax weights [B, Hq, w, S] from the definition; 0 where the query is padding."""
    batch, heads, w, _ = window.shape
    s, groups = k.shape[2], heads // k.shape[1]
    weights = torch.zeros(batch, heads, w, s, dtype=dtype)
    for b in range(batch):
        for head in range(heads):
            h = head // groups
            seen = torch.ones(s, dtype=torch.bool)
            if visible is not None:
                seen = visible[b, h if visible.shape[1] > 1 else 0]
            for i in range(w):
                n = s - w + i + 1
                if n < 1 or not seen[n - 1]:
                    continue
                logits = k[b, h, :n].to(dtype) @ window[b, head, i].to(dtype) * form.scaling
                if form.softcap:
                    logits = form.softcap * torch.tanh(logits / form.softcap)
                weights[b, head, i, :n] = logits.masked_fill(~seen[:n], -torch.inf).softmax(-1)
    return weights


def twin(
    scorer: Scorer,
    observed: Observed,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    form: Logits,
    dtype: torch.dtype = torch.float64,
    pool: int = 7,
) -> Tensor:
    """Scores [B, Hq, N] of every query head; padding is 0 here."""
    heads, w = observed.window.shape[1:3]
    s, groups = k.shape[2], heads // k.shape[1]
    n = s - w
    shown = torch.ones(B, k.shape[1], s, dtype=torch.bool) if visible is None else visible.expand(B, k.shape[1], s)
    raw = weigh(observed.window, k, visible, form, dtype).sum(2)[..., :n]
    scores = torch.zeros(B, heads, n, dtype=dtype)
    for b in range(B):
        for head in range(heads):
            seen = shown[b, head // groups]
            if scorer == "expected":
                assert observed.mean is not None
                assert observed.covariance is not None
                keys = k[b, head // groups, :n].to(dtype)
                mean, sigma = observed.mean[b, head].to(dtype), observed.covariance[b, head].to(dtype)
                logs = form.scaling * (keys @ mean) + form.scaling**2 / 2 * ((keys @ sigma) * keys).sum(-1)
                scores[b, head] = logs.masked_fill(~seen[:n], -torch.inf).softmax(-1).nan_to_num()
            else:
                for j in range(n):
                    near = raw[b, head, max(0, j - pool // 2) : j + pool // 2 + 1]
                    scores[b, head, j] = near.sum() / pool
            if scorer != "window":
                norms = v[b, head // groups].to(dtype).norm(dim=-1)
                scores[b, head] *= norms[:n] / norms[seen].mean() if seen.any() else 0
            scores[b, head, ~seen[:n]] = 0
    return scores


def check(scorer: Scorer, observed: Observed, k: Tensor, v: Tensor, visible: Tensor | None, form: Logits) -> Tensor:
    """Within a few times the error of the same definition in float32."""
    exact = twin(scorer, observed, k, v, visible, form)
    off = (twin(scorer, observed, k, v, visible, form, torch.float32).double() - exact).abs().max()
    bound = 4 * off + 4 * torch.finfo(torch.float32).eps * exact.max()
    got, expected = score_records(scorer, observed, k, v, visible, form), exact.unflatten(1, (HKV, -1)).mean(2)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    hidden = torch.zeros_like(got, dtype=torch.bool)
    if visible is not None:
        hidden = ~visible.expand(B, HKV, -1)[..., : got.shape[2]]
    assert (got[hidden] == -1).all()
    assert ((got.double() - expected).abs() <= bound)[~hidden].all()
    return got


@pytest.mark.parametrize("block", [1, 5, 37, 40, 41, 4096])
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_the_definition(scorer: Scorer, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "BLOCK", block)
    observed, k, v = make()
    check(scorer, observed, k, v, None, FORM)
    check(scorer, observed, k, v, pad(HKV), FORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("h", [0, 1, HKV])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_layout_and_mask(
    scorer: Scorer, groups: int, h: int, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "BLOCK", 16)
    observed, k, v = make(groups, dtype=dtype)
    assert not k.is_contiguous()
    check(scorer, observed, k, v, pad(h) if h else None, Logits(0.4, softcap))


def test_expected_scores_cross_blocks() -> None:
    s = 3 * 64 + W + 5
    observed, k, v = make(s=s, w=W)
    importance_block = importance.BLOCK * W // D
    assert importance_block > s, "the plain case is one block"
    whole = score_records("expected", observed, k, v, None, FORM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "BLOCK", 1)  # 64 is the least
        assert torch.allclose(score_records("expected", observed, k, v, None, FORM), whole, rtol=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("n_real", [0, 1, W - 1, W, W + 1])
def test_padding_never_beats_a_record_and_padded_queries_say_nothing(scorer: Scorer, n_real: int) -> None:
    observed, k, v = make()
    visible = torch.ones(B, 1, S, dtype=torch.bool)
    visible[1, :, : S - n_real] = False
    native = check(scorer, observed, k, v, visible, FORM)
    assert native.isfinite().all()
    assert (native[0] >= 0).all()
    assert (native[1][:, : S - max(n_real, W)] == -1).all()
    loud = Observed(observed.window.clone(), observed.mean, observed.covariance)
    k, v = k.clone(), v.clone()
    loud.window[1, :, : max(W - n_real, 0)] = torch.nan  # attention over nothing may leave this
    k[1, :, : S - n_real] = torch.nan
    v[1, :, : S - n_real] = torch.nan
    assert torch.equal(score_records(scorer, loud, k, v, visible, FORM), native)


def test_padding_on_the_right_says_nothing() -> None:
    observed, k, v = make()
    visible = torch.ones(B, 1, S, dtype=torch.bool)
    visible[1, :, -2:] = False
    native = check("value", observed, k, v, visible, FORM)
    curve = measure_spread(observed, k, visible, FORM)
    observed.window[1, :, -2:] = torch.nan
    k[1, :, -2:] = torch.nan
    v[1, :, -2:] = torch.nan
    assert torch.equal(score_records("value", observed, k, v, visible, FORM), native)
    assert torch.equal(measure_spread(observed, k, visible, FORM), curve)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("s", [1, W - 1, W])
def test_a_context_of_no_more_than_the_window_has_nothing_to_score(scorer: Scorer, s: int) -> None:
    observed, _, _ = make()
    k, v = torch.randn(B, HKV, s, D), torch.randn(B, HKV, s, DV)
    got = score_records(scorer, observed, k, v, None, FORM)
    assert got.shape == (B, HKV, 0)
    assert sort_gains(got).shape == (B, 0)
    curve = measure_spread(observed, k, None, FORM)
    assert torch.allclose(curve.sum(-1), torch.ones(B))


def test_pooling_by_hand() -> None:
    """One query, weights 1/16 ... 8/16 on five records: the ends average zeros, and the window is dropped first."""
    weights = torch.tensor([1.0, 2.0, 1.0, 4.0, 8.0, 16.0])
    k = weights.log()[None, None, :, None]
    observed = Observed(torch.ones(1, 1, 1, 1), None, None)
    got = score_records("window", observed, k, k, None, Logits(1.0, None), pool=3)[0, 0]
    assert torch.allclose(got, torch.tensor([3.0, 4.0, 7.0, 13.0, 12.0]) / 3 / 32)
    raw = score_records("window", observed, k, k, None, Logits(1.0, None), pool=1)[0, 0]
    assert torch.allclose(raw, weights[:5] / 32)


@pytest.mark.parametrize("pool", [0, -1, 4])
def test_a_pool_without_a_centre_is_refused(pool: int) -> None:
    observed, k, v = make()
    with pytest.raises(ConfigError, match="odd"):
        score_records("window", observed, k, v, None, FORM, pool=pool)


@pytest.mark.parametrize("chunks", [[20], [7, 13], [15, 1, 1, 1, 1, 1], [1] * 20, [17, 2, 1]])
@pytest.mark.parametrize("w", [1, 4, 20, 64])
def test_the_window_slides_over_chunks_and_steps(chunks: list[int], w: int) -> None:
    q = torch.randn(B, 4, 20, D)
    observed, seen = None, 0
    for part in q.split(chunks, 2):
        observed = observe_queries(part, w, "window", observed)
        seen += part.shape[2]
        assert torch.equal(observed.window, q[:, :, max(0, seen - w) : seen])
        assert observed.mean is None
        assert observed.covariance is None
        held = observed.window.untyped_storage().nbytes()
        assert held == observed.window.numel() * 4, "no view of the whole pass"
    with pytest.raises(ConfigError, match="window"):
        observe_queries(q, 0, "window", None)


def test_the_moments_are_of_the_last_text_that_was_read() -> None:
    q = torch.randn(B, 4, MOMENT_QUERIES + 30, D).bfloat16()
    observed = observe_queries(q, W, "expected", None)
    last = q[:, :, -MOMENT_QUERIES:].double()
    assert observed.mean is not None
    assert observed.covariance is not None
    for b in range(B):
        for h in range(4):
            assert torch.allclose(observed.mean[b, h].double(), last[b, h].mean(0), atol=1e-5)
            assert torch.allclose(observed.covariance[b, h].double(), last[b, h].T.cov(correction=0), atol=1e-5)
    step = observe_queries(q[:, :, :1], W, "expected", observed)
    assert step.mean is observed.mean
    assert step.covariance is observed.covariance
    again = observe_queries(q[:, :, :9], W, "expected", step)
    assert again.mean is not None
    assert torch.allclose(again.mean, q[:, :, :9].float().mean(2), atol=1e-5)
    first = observe_queries(q[:, :, :1], W, "expected", None)
    assert first.mean is not None
    assert torch.equal(first.mean, q[:, :, 0].float()), "where there are none, one query must do"
    assert first.covariance is not None
    assert (first.covariance == 0).all()


@given(st.lists(st.integers(2, MOMENT_QUERIES + 90), min_size=1, max_size=6), st.integers(0, 700))
def test_any_passes_give_the_moments_of_one(sizes: list[int], pad: int) -> None:
    q = torch.randn(B, 2, sum(sizes), D)
    valid = torch.arange(sum(sizes)).expand(B, -1) >= torch.tensor([[pad], [0]])
    whole, observed, n = observe_queries(q, W, "expected", None, valid=valid), None, 0
    for part in q.split(sizes, 2):
        n += part.shape[2]
        observed = observe_queries(part, W, "expected", observed, valid=valid[:, :n])
    assert observed is not None
    for mine, expected in zip(observed, whole, strict=True):
        assert mine is not None
        assert expected is not None
        assert torch.allclose(mine, expected, atol=1e-6)
    assert observe_queries(q[:, :, :1], W, "expected", observed).latest is None, "the text is over"


def test_padding_counts_in_no_moment() -> None:
    q = torch.randn(B, 4, 30, D)
    valid = torch.ones(B, 30, dtype=torch.bool)
    valid[0, :11] = False
    valid[1] = False
    loud = q.masked_fill(~valid[:, None, :, None], torch.nan)
    got = observe_queries(loud, W, "expected", None, valid=valid)
    alone = observe_queries(q[:1, :, 11:], W, "expected", None)
    for mine, plain in zip(got[1:3], alone[1:3], strict=True):
        assert mine is not None
        assert plain is not None
        assert torch.allclose(mine[:1], plain, atol=1e-6)
        assert (mine[1] == 0).all()


def test_expected_is_the_mean_weight_of_gaussian_queries() -> None:
    n, samples = 12, 400_000
    k = torch.randn(1, 1, n + 1, D) * 0.7
    factor, mean = torch.randn(D, D) * 0.4, torch.randn(D) * 0.5
    observed = Observed(torch.zeros(1, 1, 1, D), mean[None, None], (factor @ factor.T)[None, None])
    got = score_records("expected", observed, k, torch.ones(1, 1, n + 1, DV), None, FORM)[0, 0]
    q = mean + torch.randn(samples, D) @ factor.T
    sampled = (q @ k[0, 0, :n].T * FORM.scaling).exp().double()
    estimate = sampled.mean(0) / sampled.mean(0).sum()
    error = sampled.std(0) / samples**0.5 / sampled.mean(0)
    assert (error < 0.02).all(), "the sample says something"
    # Six standard errors of the record itself and of the sum that divides it.
    assert ((got / estimate - 1).abs() <= 6 * (error + error.max())).all()


def test_expected_needs_its_moments() -> None:
    observed, k, v = make()
    with pytest.raises(CacheStateError, match="observe_queries"):
        score_records("expected", Observed(observed.window, None, None), k, v, None, FORM)


@pytest.mark.parametrize("scorer", ["value", "expected"])
def test_a_score_doubles_with_its_value(scorer: Scorer) -> None:
    observed, k, v = make()
    before = score_records(scorer, observed, k, v, None, FORM)
    v = v.clone()
    v[:, :, 7] *= 2
    after = score_records(scorer, observed, k, v, None, FORM)
    # Against a neighbour: the mean norm, which divides both, grew too.
    assert torch.allclose(after[..., 7] / after[..., 8], 2 * before[..., 7] / before[..., 8], rtol=1e-5)
    zero = score_records(scorer, observed, k, torch.zeros_like(v), None, FORM)
    assert (zero == 0).all()


def test_gains_are_the_sorted_heads_summed() -> None:
    scores = torch.rand(B, 3, 50) ** 4
    scores[1, :, :10] = -1.0
    got = sort_gains(scores)
    for b in range(B):
        columns = sum(scores[b, h].double().clamp_min(0).sort(descending=True).values for h in range(3))
        assert isinstance(columns, Tensor)
        assert torch.allclose(got[b].double(), columns / columns.sum(), rtol=1e-6)
    assert got.dtype == torch.float32
    assert (got.diff(dim=-1) <= 0).all()
    assert torch.allclose(got.sum(-1), torch.ones(B))
    assert (got[1, 40:] == 0).all(), "padding gains nothing"
    assert torch.allclose(sort_gains(scores[:, [2, 0, 1]]), got, rtol=1e-6)
    assert (sort_gains(torch.zeros(B, 3, 5)) == 0).all()
    assert (sort_gains(torch.full((B, 3, 5), -1.0)) == 0).all()


@pytest.mark.parametrize("h", [0, 1, HKV])
@pytest.mark.parametrize("w", [1, 4, 7])
def test_the_spread_is_of_each_querys_own_best(h: int, w: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "BLOCK", 9)
    observed, k, _ = make(w=w)
    visible = pad(h) if h else None
    if visible is not None:
        visible[1, :, : S - 2] = False  # two real queries
    got = measure_spread(observed, k, visible, FORM)
    weights = weigh(observed.window, k, visible, FORM, torch.float64).unflatten(1, (HKV, -1)).mean(2)
    for b in range(B):
        rows = weights[b].flatten(0, 1)
        rows = rows[rows.sum(-1) > 0]
        exact = rows.sort(-1, descending=True).values.mean(0)
        assert torch.allclose(got[b].double(), exact, rtol=1e-5, atol=1e-7)
        assert torch.allclose(got[b, 0].double(), rows.amax(-1).mean(), rtol=1e-5)
    assert (got.diff(dim=-1) <= 0).all()
    assert torch.allclose(got.sum(-1), torch.ones(B))


def test_the_best_of_each_step_hold_no_less_than_any_one_set() -> None:
    observed, k, _ = make(s=9, w=3)
    curve = measure_spread(observed, k, None, FORM).double().cumsum(-1)
    weights = weigh(observed.window, k, None, FORM, torch.float64).unflatten(1, (HKV, -1)).mean(2).mean(2)
    for c in range(1, 10):
        best = torch.stack([weights[..., list(chosen)].sum(-1) for chosen in combinations(range(9), c)]).amax(0)
        assert (curve[:, c - 1] >= best.mean(1) - 1e-6).all()


def test_a_sequence_of_padding_has_no_spread() -> None:
    observed, k, _ = make()
    visible = torch.ones(B, 1, S, dtype=torch.bool)
    visible[1] = False
    got = measure_spread(observed, k, visible, FORM)
    assert (got[1] == 0).all()
    assert torch.equal(got[0], measure_spread(observed, k, None, FORM)[0])
    assert measure_spread(observed, k[:, :, :0], None, FORM).shape == (B, 0)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.inputs:
                self.numel = max(self.numel, made.numel())
        return out


@pytest.mark.parametrize("what", [*SCORERS, "spread"])
def test_memory_is_of_a_block_and_the_result(what: Any) -> None:
    s, w, dim, groups = 131072, 8, 16, 2
    k, v = torch.randn(1, HKV, s, dim).bfloat16(), torch.randn(1, HKV, s, dim).bfloat16()
    observed = observe_queries(torch.randn(1, HKV * groups, 16, dim), w, "expected", None)
    visible = torch.ones(1, 1, s, dtype=torch.bool)
    with Largest([k, v, visible]) as mode:
        if what == "spread":
            measure_spread(observed, k, visible, FORM)
        else:
            score_records(what, observed, k, v, visible, FORM)
    # The expected scores of all query heads, and the weights of a few queries, are held over the whole context.
    wide = {"expected": groups, "spread": importance.QUERIES_AT_ONCE}.get(what, 1)
    assert mode.numel <= max(HKV * s * wide, HKV * groups * w * 4096) + 1024
    assert mode.numel >= HKV * (s - w), "the mode sees the result"
