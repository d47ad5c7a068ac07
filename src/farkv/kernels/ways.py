"""What a native choice may be besides a head's best records: varied, drawn, or limited to pages; each with its checks.

In: the operands of one way. Out: nothing; what C must not read is refused with CacheStateError.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch

from farkv._axes import Bool, Float32, Int, Tensor
from farkv.errors import CacheStateError

# C counts the records of a choice in 32 bits, and a vector of them beyond the last.
MOST_RECORDS = 2**31 - 4096


class Varied(NamedTuple):
    """A choice whose size varies from head to head.

    caps: each sequence's own, at most the cap of all.  least: of each sequence, the mass that a record must have.
    fewest: what every head of a sequence chooses, whatever weight that has, up to its cap.
    counts, floors: written: how many records each head chose, sinks included, and the least mass of the others.
    """

    caps: Int[Tensor, " B"]
    least: Float32[Tensor, " B"]
    fewest: Int[Tensor, " B"]
    counts: Int[Tensor, "B Hkv"]
    floors: Float32[Tensor, "B Hkv"]


class Drawn(NamedTuple):
    """A choice of which some heads are sampled (math/sampling.py).

    seeds: of each head's draws; -1: its best records are chosen.  odds: written: what is added to each one's logit.
    """

    seeds: Int[Tensor, "B Hkv"]
    odds: Float32[Tensor, "B Hkv K"]


class Paged(NamedTuple):
    """A choice of records on pages, of which a step may read few (math/select.py, `limit_pages`).

    here: full pages that are in memory; what follows the last of them is.  tokens: of a page.  more: how many pages
    more a head may read.  counts: written: how many records each head chose, where fewer than the cap are in reach.
    """

    here: Bool[Tensor, "B Hkv P"]
    tokens: int
    more: int
    counts: Int[Tensor, "B Hkv"]


def check_ways(
    ways: tuple[Varied | None, Drawn | None, Paged | None], sizes: tuple[int, int], cap: int, n_taken: int
) -> None:
    """Raise CacheStateError unless at most one way was asked for, with operands of its own that C may use."""
    varied, drawn, paged = ways
    if sum(way is not None for way in ways) > 1 or (drawn is not None and n_taken):
        raise CacheStateError(
            "native select: expected one of a varied, a drawn and a paged choice, the drawn one without taken records, "
            "got several; ask for one at a time"
        )
    if varied is not None:
        _check_varied(varied, sizes, cap)
    if drawn is not None:
        _check_parts(drawn, (sizes, (*sizes, cap)), (torch.int64, torch.float32))
    if paged is not None:
        _check_paged(paged, sizes)


def _check_varied(varied: Varied, sizes: tuple[int, int], cap: int) -> None:
    shapes = (sizes[:1], sizes[:1], sizes[:1], sizes, sizes)
    _check_parts(varied, shapes, (torch.int64, torch.float32, torch.int64, torch.int64, torch.float32))
    for each in (varied.caps, varied.fewest):
        if not all(0 <= own <= cap for own in each.tolist()):
            refuse(f"counts in 0 .. {cap}", each)


def _check_paged(paged: Paged, sizes: tuple[int, int]) -> None:
    pages = paged.here.shape[-1]
    _check_parts((paged.here, paged.counts), ((*sizes, pages), sizes), (torch.bool, torch.int64))
    if not 0 < paged.tokens <= MOST_RECORDS or paged.more < 0:
        raise CacheStateError(
            f"native select: expected pages of at least one token, and 0 or more of them to read, got {paged.tokens} "
            f"tokens and {paged.more} pages; pass the store's own numbers"
        )


def _check_parts(parts: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...], dtypes: tuple[Any, ...]) -> None:
    for each, shape, dtype in zip(parts, shapes, dtypes, strict=True):
        if each.shape != shape or each.dtype is not dtype or not each.is_cpu or not each.is_contiguous():
            refuse(f"contiguous {dtype} {shape} in CPU memory", each)


def refuse(what: str, got: Tensor) -> NoReturn:
    """Raise CacheStateError: say what was expected, and what came."""
    strides = got.stride() if got.layout is torch.strided else got.layout
    form = f"{got.dtype} {tuple(got.shape)} with strides {strides} on {got.device}"
    raise CacheStateError(f"native kernels: expected {what}, got {form}; pass tensors of one layer as it is stored")
