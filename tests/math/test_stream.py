"""Attention in blocks, against one softmax over everything in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from farkv.math import stream as module
from farkv.math.logits import Logits
from farkv.math.stream import Stream, may_fuse


class Case:
    """Queries of the last T of S tokens, their records, what is visible, and where blocks end."""

    def __init__(self, draw: st.DrawFn):
        self.batch, self.kv_heads, self.groups = (draw(st.integers(1, n)) for n in (3, 2, 4))
        self.n_new, self.past = draw(st.integers(1, 40)), draw(st.integers(0, 90))
        self.dim = draw(st.sampled_from([4, 8, 16]))
        self.v_dim = draw(st.sampled_from([self.dim, self.dim, self.dim + 3]))
        self.dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
        self.cuts = sorted(draw(st.lists(st.integers(0, self.past), max_size=4)))
        self.seed = draw(st.integers(0, 10**6))
        self.flags = draw(st.sampled_from(["none", "padding", "queries", "heads", "evicted"]))
        softcap = draw(st.sampled_from([None, None, 3.0]))
        generator = torch.Generator().manual_seed(self.seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        heads, total = self.kv_heads * self.groups, self.past + self.n_new
        # Strides as they are in a model and in the store: heads inside tokens, keys and values side by side.
        self.q = make(self.batch, self.n_new, heads, self.dim).transpose(1, 2)
        rows = make(self.batch, self.kv_heads, total, self.dim + self.v_dim)
        self.k, self.v = rows.split([self.dim, self.v_dim], -1)
        sinks = make(heads) if draw(st.booleans()) else None
        self.form = Logits(draw(st.sampled_from([self.dim**-0.5, 1.0])), softcap, sinks)
        self.visible = self._make_flags(generator)

    def _make_flags(self, generator: torch.Generator) -> Tensor | None:
        total = self.past + self.n_new
        if self.flags == "none":
            return None
        if self.flags == "padding":
            # Up to all but one: whole first blocks are hidden from a sequence, and its first queries see nothing.
            pad = torch.randint(0, total, (self.batch, 1, 1, 1), generator=generator)
            return torch.arange(total) >= pad
        heads = 1 if self.flags == "queries" else self.q.shape[1]
        n_new = 1 if self.flags == "evicted" else self.n_new
        return torch.rand(self.batch, heads, n_new, total, generator=generator) > 0.5

    def mask(self) -> Tensor:
        """Everything that a query may see, the causal order included."""
        order = torch.ones(self.n_new, self.past + self.n_new, dtype=torch.bool).tril(self.past)
        return order[None, None] if self.visible is None else self.visible & order

    def blocks(self) -> list[tuple[int, int]]:
        """Where blocks start and end; the last is the new tokens' own."""
        ends = [0, *self.cuts, self.past, self.past + self.n_new]
        return list(itertools.pairwise(ends))

    def run(self, blocks: list[tuple[int, int]]) -> Tensor:
        stream = Stream(self.q, self.form)
        for a, b in blocks:
            flags = None if self.visible is None else self.visible[..., a:b]
            own = a == self.past and b == self.past + self.n_new
            stream.add(self.k[:, :, a:b], self.v[:, :, a:b], flags, causal=own)
        return stream.finish()

    def exact(self) -> Tensor:
        """One softmax over everything, in float64."""
        k, v = (t.double().repeat_interleave(self.groups, 1) for t in (self.k, self.v))
        logits = self.q.double() @ k.mT * self.form.scaling
        if self.form.softcap:
            logits = self.form.softcap * torch.tanh(logits / self.form.softcap)
        logits = logits.masked_fill(~self.mask(), -math.inf)
        if self.form.sinks is not None:
            sink = self.form.sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
            logits, v = torch.cat([logits, sink], -1), torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
        return logits.softmax(-1).nan_to_num(0.0) @ v

    def allowed(self) -> float:
        """Twice the error of torch's own attention in one piece, and what rounding may add at the least."""
        k, v = (t.repeat_interleave(self.groups, 1) for t in (self.k, self.v))
        plain = Logits(self.form.scaling)
        whole = scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask(), scale=plain.scaling)
        twin = Case.__new__(Case)
        twin.__dict__.update(self.__dict__, form=plain)
        error = (whole.double() - twin.exact()).abs().max().item()
        largest = self.v.double().abs().max().item()
        # The output is rounded to its dtype; a block's log-sum-exp (below 64 here) to float32.
        return 2 * error + largest * (torch.finfo(self.dtype).eps + 64 * torch.finfo(torch.float32).eps)


cases = st.composite(Case)


@given(cases())
def test_blocks_give_what_one_softmax_gives(case: Case) -> None:
    got = case.run(case.blocks())
    assert got.dtype == case.dtype
    assert (got.double() - case.exact()).abs().max() <= case.allowed()


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_blocks_is_of_no_matter(case: Case, random: object) -> None:
    blocks = case.blocks()
    random.shuffle(blocks)  # type: ignore[attr-defined]
    assert (case.run(blocks).double() - case.exact()).abs().max() <= case.allowed()


@given(cases())
def test_the_plain_path_gives_what_the_fused_one_gives(case: Case) -> None:
    fused = case.run(case.blocks())
    kernel, module._fused = module._fused, None
    try:
        plain = case.run(case.blocks())
    finally:
        module._fused = kernel
    assert (fused.double() - plain.double()).abs().max() <= 2 * case.allowed()


@given(cases())
def test_small_tiles_change_nothing_but_rounding(case: Case) -> None:
    size, module.TILE_BYTES = module.TILE_BYTES, 2048
    try:
        got = case.run(case.blocks())
    finally:
        module.TILE_BYTES = size
    assert (got.double() - case.exact()).abs().max() <= case.allowed()


# --- what the cases above meet by chance, or not at all -----------------------------------------------------------


def test_a_query_that_sees_nothing_is_zero() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4)
    visible = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    visible[:, :, 1] = True
    for dim in (4, 3):  # fused, plain
        for sinks in (None, torch.zeros(2)):
            stream = Stream(q, Logits(0.5, sinks=sinks))
            stream.add(k, k[..., :dim], visible)
            out = stream.finish()
            assert torch.equal(out[:, :, ::2], torch.zeros(1, 2, 2, dim))
            assert out[:, :, 1].abs().min() > 0


def test_a_long_block_whose_first_records_are_hidden() -> None:
    # The fused kernel splits keys at 512 itself, and queries at 256.
    q, k, v = torch.randn(1, 2, 800, 8), torch.randn(1, 1, 1300, 8), torch.randn(1, 1, 1300, 8)
    visible = torch.arange(1300)[None, None, None] >= 700
    stream = Stream(q, Logits(1.0))
    stream.add(k[:, :, :650], v[:, :, :650], visible[..., :650])
    stream.add(k[:, :, 650:], v[:, :, 650:], visible[..., 650:])
    exact = (q.double() @ k[:, :, 700:].double().mT).softmax(-1) @ v[:, :, 700:].double()
    assert torch.allclose(stream.finish().double(), exact, rtol=0, atol=1e-5)


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    q, k, v = torch.full((1, 1, 1, 4), 100.0), torch.ones(1, 1, 6, 4), torch.randn(1, 1, 6, 4)
    for signs in ((1, -1), (-1, 1), (-1, -1)):
        stream = Stream(q, Logits(1.0))
        for i, sign in enumerate(signs):
            stream.add(sign * k[:, :, 3 * i : 3 * i + 3], v[:, :, 3 * i : 3 * i + 3], None)
        of = [i for i in range(2) if signs[i] == max(signs)]
        assert torch.allclose(stream.finish(), v.view(1, 1, 2, 3, 4)[:, :, of].flatten(2, 3).mean(2, True))


def test_what_the_fused_kernel_cannot_do_is_done_plainly() -> None:
    q, k, v = torch.randn(1, 1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    form = Logits(0.5)
    if module._fused is not None:
        assert may_fuse(q, k, v, form)
    assert not may_fuse(q, k, v[..., :3], form)
    assert not may_fuse(q, k, v, Logits(0.5, 30.0))
    # It would read the keys of the wrong records, without a word.
    turned = k.mT.contiguous().mT
    assert not may_fuse(q, turned, v, form)
    streams = [Stream(q[:, 0], form) for _ in range(2)]
    streams[0].add(k, v, None)
    streams[1].add(turned, v, None)
    assert torch.allclose(streams[0].finish(), streams[1].finish(), atol=1e-6)


def test_float64_stays() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5))
    stream = Stream(q, Logits(0.5))
    stream.add(k[:, :, :2], v[:, :, :2], None)
    stream.add(k[:, :, 2:], v[:, :, 2:], None)
    got = stream.finish()
    assert got.dtype == torch.float64
    assert torch.allclose(got, (q @ k.mT * 0.5).softmax(-1) @ v, rtol=1e-12, atol=1e-12)


def test_the_output_lies_as_a_model_wants_it() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    stream = Stream(q, Logits(0.5))
    stream.add(k, k, None)
    assert stream.finish().transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("causal", [False, True])
def test_an_empty_block_changes_nothing(causal: bool) -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    streams = [Stream(q, Logits(0.5)) for _ in range(2)]
    streams[0].add(k[:, :, :0], k[:, :, :0], None)
    for stream in streams:
        stream.add(k, k, None, causal=causal)
    assert torch.equal(streams[0].finish(), streams[1].finish())
