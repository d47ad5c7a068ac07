"""Page bounds: no key of a page passes them, however its tokens came."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from farkv.math.bounds import bound_pages, mark_pages, rank_tokens, score_bounds
from farkv.math.logits import Logits
from farkv.store.follow import Cropped
from farkv.store.ledger import Ledger
from farkv.store.near.bounds import PageBounds

B, HKV, G, D = 2, 2, 3, 5
CPU = torch.device("cpu")
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9), st.sampled_from([None, 2.0]), dtypes)
def test_no_logit_of_a_page_is_above_its_bound(
    seed: int, tokens: int, page: int, softcap: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(B, HKV, tokens, D, generator=generator).to(dtype)
    q = torch.randn(B, HKV * G, 1, D, generator=generator).to(dtype)
    valid = torch.rand(B, 1, tokens, generator=generator) < 0.7
    bound = score_bounds(q, bound_pages(k, valid, page), Logits(0.3, softcap)).double()
    logits = q.double().view(B, HKV, G, D) @ k.double().mT * 0.3
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    of_page = bound.repeat_interleave(page, -1)[..., :tokens]
    seen = valid[:, :, None].expand_as(logits)
    assert (of_page >= logits - 1e-5)[seen].all()


@given(st.integers(0, 10**6), st.integers(1, 9), st.lists(st.integers(1, 13), min_size=1, max_size=8), dtypes)
def test_bounds_do_not_depend_on_how_tokens_come(seed: int, page: int, sizes: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(B, HKV, sum(sizes), D, generator=generator).to(dtype)
    valid = torch.rand(B, 1, sum(sizes), generator=generator) < 0.5
    ledger = Ledger("index", None)
    index, start = PageBounds(ledger, CPU, 0, page), 0
    for n in sizes:
        part = slice(start, start + n)
        index.append(bound_pages(k[:, :, part], valid[..., part], page, index.unfinished), n)
        start += n
    whole = bound_pages(k, valid, page)
    assert torch.equal(index.view(start), whole)
    assert ledger.used == index.rows.n_bytes
    # The keys that a crop takes back are in the bounds of the last page: it goes too, and is made anew.
    index.crop(Cropped(start - 1, start - 1))
    assert index.length == (start - 1) // page * page
    assert index.length == 0 or torch.equal(index.view(index.length), whole[:, :, : index.length // page])


def test_bounds_grow_by_a_quarter_in_tokens() -> None:
    ledger = Ledger("index", None)
    index = PageBounds(ledger, CPU, 0, 16)
    capacities = set[int]()
    for _ in range(1000):
        index.append(bound_pages(torch.zeros(1, 1, 1, D), None, 16, index.unfinished), 1)
        capacities.add(index.rows.capacity)
    assert len(capacities) < 12
    assert min(capacities) == 64 // 16
    assert max(capacities) <= 1000 * 5 // 4 // 16 + 64 // 16


def test_whole_pages_stand_together_the_best_first() -> None:
    pooled = torch.tensor([[[0.5, 3.0, -torch.inf, 2.0]]])
    order = rank_tokens(pooled, 3, 11)[0, 0].argsort(descending=True).tolist()
    assert order == [3, 4, 5, 9, 10, 0, 1, 2, 6, 7, 8]


def test_a_page_counts_where_one_token_is_real() -> None:
    valid = torch.tensor([[[False, False, False, True, True]]])
    assert mark_pages(valid, 2).tolist() == [[[False, True, True]]]
