"""The keep lever: what is read is what is kept, what is kept is what XKV says, and decoding stays within it."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import farkv
from farkv.calibrate.plan import Allocation, Plan
from farkv.errors import CacheStateError
from farkv.hf.ask import Listener, prefill
from farkv.hf.identity import identify_model
from farkv.math.allocate import allocate, measure_retention
from farkv.methods import XKV, InfiniGen, Method
from tests.hf.tape import Tape, check_replay, replay_attention
from tests.hf.test_exact import BEAM
from tests.models import FAMILIES, assert_same, forward, generate, make_model, make_prompt

TOKENS = 60
SINGLE = make_prompt(1, tokens=TOKENS)
PADDED = make_prompt(3, tokens=TOKENS, pad=20)
IDS = make_prompt(2, tokens=TOKENS)["input_ids"]


def make_shares(model: Any, base: int = 0, **levers: Any) -> Plan:
    """Return a plan for a model with these shares per lever."""
    rows = {
        name: Allocation(
            tuple(shares), base if name == "keep" else 0, "xkv", {"ratio": 0.3}, tuple(shares), tuple(shares)
        )
        for name, shares in levers.items()
    }
    with farkv.attach(model, profile=False) as far:
        managed = far.managed
    return Plan(identify_model(model), tuple(managed), rows)  # type: ignore[arg-type]


def steps(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    return [forward(model, ids[:, t : t + 1], cache) for t in range(ids.shape[1])]


def places(store: Any, layer: int) -> Tensor:
    """Return which tokens the rows of a layer are, [B, Hkv, S]."""
    data = store.pool[layer].view()
    rows = torch.arange(data.shape[2]).expand(*data.shape[:2], -1)
    return store.locate(layer, rows)


class KeptTape(Tape):
    """A tape that also sees dense reads, and notes tokens where the store knows rows."""

    def __enter__(self) -> KeptTape:
        super().__enter__()
        store = self.cache.engine.store
        read_chosen, read_all = store.read, store.read_all

        def record_chosen(layer: int, *args: Any) -> Any:
            out = read_chosen(layer, *args)
            valid = None if out.valid is None else out.valid.clone()
            self.passes[-1].reads[layer] = (store.locate(layer, out.positions).clone(), valid)
            return out

        @contextmanager
        def record_all(layer: int, *, whole: bool = False) -> Any:
            with read_all(layer, whole=whole) as found:
                if not whole:
                    self.passes[-1].reads[layer] = (places(store, layer).clone(), None)
                yield found

        store.read, store.read_all = record_chosen, record_all
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.cache.engine.store.read_all


# --- a whole budget ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_budget_equals_the_plain_model(family: str) -> None:
    model = make_model(family)
    for prompt, near, options in ((make_prompt(3, pad=9), None, BEAM), (make_prompt(1, tokens=30), "1MiB", {})):
        plain = generate(model, prompt, **options)
        with farkv.attach(model, XKV(fraction=1.0), near=near) as far:
            assert_same(generate(model, prompt, far.new_cache(), **options), plain)


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_a_whole_budget_beside_a_whole_selector_equals_the_plain_model(near: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(3, pad=9)
    plain = generate(model, prompt)
    with farkv.attach(model, InfiniGen(fraction=1.0), XKV(fraction=1.0), near=near) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)


def test_the_default_keeps_a_short_text_whole() -> None:
    model, prompt = make_model("llama"), make_prompt(1, tokens=50)
    plain = generate(model, prompt)
    with farkv.attach(model, XKV()) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)
        assert far.receipt().kept_fraction == 1.0
    with farkv.attach(model, XKV()) as far:
        forward(model, make_prompt(1, tokens=200)["input_ids"], far.new_cache())
        assert far.receipt().kept_fraction <= 0.384


# --- what is read is what is kept -------------------------------------------------------------------------------

METHODS: dict[str, tuple[Method, ...]] = {
    "xkv": (XKV(fraction=0.3),),
    "tokens": (XKV(tokens=60),),
    "retention": (XKV(retention=0.6),),
    "paper": (XKV(tokens=60, paper=True),),
    "infinigen+keep": (InfiniGen(fraction=0.2), XKV(fraction=0.5)),
}


def record(model: Any, methods: tuple[Method, ...], prompt: Any, near: Any = None, **options: Any) -> KeptTape:
    with farkv.attach(model, *methods, near=near) as far:
        cache = far.new_cache()
        with KeptTape(model, cache) as tape:
            generate(model, prompt, cache, **{"n": 5, **options})
    assert all(cache.engine.store.evicted.values()), "nothing was evicted: the test proves nothing"
    return tape


@pytest.mark.parametrize("method", METHODS)
def test_decoding_equals_a_dense_replay_that_sees_the_kept_records_alone(method: str) -> None:
    model = make_model("llama")
    check_replay(model, record(model, METHODS[method], PADDED))


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma3", "qwen3_next", "gpt_oss"])
def test_every_kind_of_attention_reads_what_is_kept(family: str) -> None:
    model = make_model(family)
    check_replay(model, record(model, METHODS["xkv"], SINGLE))
    check_replay(model, record(model, METHODS["infinigen+keep"], PADDED, "1MiB"))


@pytest.mark.parametrize("method", ["xkv", "infinigen+keep"])
def test_beams_keep_rows_and_places_together(method: str) -> None:
    model = make_model("llama")
    tape = record(model, METHODS[method], make_prompt(2, tokens=TOKENS, pad=16), num_beams=3)
    assert any(p.reorder for p in tape.passes)
    check_replay(model, tape)


def test_a_second_prompt_attends_to_what_is_kept_and_to_itself_and_is_evicted_too() -> None:
    model = make_model("llama")
    more = make_prompt(2, tokens=22, seed=5)["input_ids"]
    for methods in ((XKV(fraction=0.3),), (XKV(tokens=60),), (InfiniGen(fraction=0.2), XKV(fraction=0.4))):
        with farkv.attach(model, *methods) as far:
            cache = far.new_cache()
            with KeptTape(model, cache) as tape:
                forward(model, IDS, cache)
                before = [places(cache.engine.store, i) for i in range(4)]
                steps(model, cache, more[:, :2])
                forward(model, more[:, 2:20], cache)
                after = [cache.engine.store.length(i) for i in range(4)]
                steps(model, cache, more[:, 20:])
        for i in range(4):
            found = tape.passes[3].reads[i][0]
            # No row came back; the newest tokens, the second prompt's among them, are there.
            for row, old in zip(found.flatten(0, 1), before[i].flatten(0, 1), strict=True):
                assert set(row[row < TOKENS].tolist()) <= set(old.tolist())
                assert row[-20:].tolist() == list(range(TOKENS, TOKENS + 20))
            assert after[i] < found.shape[-1]
        assert cache.get_seq_length() == TOKENS + 22
        check_replay(model, tape)


# --- what is kept is what XKV says ------------------------------------------------------------------------------


class Seen:
    """The plain model's own post-RoPE queries and keys, by layer."""

    rows: ClassVar[dict[int, tuple[Tensor, Tensor, float]]] = {}


def see_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    Seen.rows[module.layer_idx] = (q, k, scaling)
    return replay_attention(module, q, k, v, mask, scaling, **kwargs)


AttentionInterface.register("see_for_tests", see_attention)
AttentionMaskInterface.register("see_for_tests", sdpa_mask)


def score_plainly(model: Any, prompt: Any, window: int = 8, pool: int = 7) -> dict[int, np.ndarray]:
    """SnapKV's scores of every layer, [B, Hkv, T - window], in float64 numpy, one loop per number: -1 on padding."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("see_for_tests")
    twin(**prompt)
    real = prompt["attention_mask"].bool().numpy()
    scores = {}
    for layer, (queries, keys, scaling) in Seen.rows.items():
        q, k = queries.numpy(), keys.numpy()
        (batch, n_heads, n), n_kv = q.shape[:3], k.shape[1]
        sums = np.zeros((batch, n_kv, n - window))
        for b in range(batch):
            for head in range(n_heads):
                kv = head // (n_heads // n_kv)
                for i in range(n - window, n):
                    logits = k[b, kv, : i + 1] @ q[b, head, i] * scaling
                    logits[~real[b, : i + 1]] = -np.inf
                    weights = np.exp(logits - logits.max())
                    sums[b, kv] += (weights / weights.sum())[: n - window] / (n_heads // n_kv)
            for kv in range(n_kv):
                wide = np.pad(sums[b, kv], pool // 2)
                sums[b, kv] = [wide[j : j + pool].sum() / pool for j in range(n - window)]
                sums[b, kv, ~real[b, : n - window]] = -1
        scores[layer] = sums
    Seen.rows.clear()
    return scores


def curve_plainly(scores: np.ndarray) -> np.ndarray:
    """XKV's importance distribution: rank by rank over the heads, of every sequence; their mean."""
    ranked = -np.sort(-np.maximum(scores, 0), -1).sum(1)
    return (ranked / ranked.sum(-1, keepdims=True)).mean(0)


# A mark is a bfloat16: the scores of two records that change places are within two of its steps.
CLOSE = 2.0**-6


def assert_best_are_kept(
    kept: Tensor, scores: np.ndarray, n_tokens: int, close: float = CLOSE, recent: int = 8
) -> None:
    newest = list(range(n_tokens - recent, n_tokens))
    for row, score in zip(kept.flatten(0, 1).tolist(), scores.reshape(-1, scores.shape[-1]), strict=True):
        assert row == sorted(set(row)), "ascending, and none twice"
        assert row[-recent:] == newest
        old = row[:-recent]
        left = np.setdiff1d(np.arange(n_tokens - recent), old)
        if len(old) and len(left):
            least = score[old].min()
            assert score[left].max() <= least + close * abs(least), "a better record was dropped"
            # Not merely any set that ties: where scores are apart it is the very same one.
            assert len(set(np.argsort(-score)[: len(old)]) - set(old)) <= 1 + len(old) // 8


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
@pytest.mark.parametrize("prompt", [SINGLE, PADDED], ids=["single", "padded"])
def test_the_published_variant_keeps_what_snapkv_selects_and_xkv_allocates(family: str, prompt: Any) -> None:
    model, total = make_model(family), 48
    scores = score_plainly(model, prompt)
    with farkv.attach(model, XKV(tokens=total, paper=True)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    store = cache.engine.store
    counts = np.array([store.length(i) - 8 for i in range(4)])
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    assert counts.sum() == total
    best = allocate(gains, tokens=total)
    assert measure_retention(gains, counts) >= measure_retention(gains, best) - 1e-6
    assert measure_retention(gains, best) > measure_retention(gains, np.full(4, total // 4)) + 1e-5
    for i in range(4):
        assert_best_are_kept(places(store, i), scores[i], TOKENS)


@pytest.mark.parametrize("prompt", [SINGLE, PADDED], ids=["single", "padded"])
def test_a_planned_prompt_keeps_the_best_by_the_very_scores(prompt: Any) -> None:
    model = make_model("llama")
    shares = (0.2, 0.5, 0.3, 0.8)
    scores = score_plainly(model, prompt)
    with farkv.attach(model, XKV(sinks=0, paper=True), plan=make_shares(model, keep=shares)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    for i, share in enumerate(shares):
        assert cache.engine.store.length(i) == int(share * TOKENS)
        assert_best_are_kept(places(cache.engine.store, i), scores[i], TOKENS, close=1e-4)


@pytest.mark.parametrize("retention", [0.5, 0.8, 0.95])
def test_a_retention_is_reached_with_the_fewest_records(retention: float) -> None:
    model = make_model("llama")
    scores = score_plainly(model, SINGLE)
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    with farkv.attach(model, XKV(retention=retention, sinks=0)) as far:
        cache = far.new_cache()
        model(**SINGLE, past_key_values=cache)
    held = np.array([cache.engine.store.length(i) - 8 for i in range(4)])
    assert measure_retention(gains, held) >= retention - 1e-6
    assert 0 <= held.sum() - allocate(gains, retention=retention).sum() <= 4, "one record per layer rounds up"


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("rule", ["xkv", "maxmin", "uniform", "pyramid"])
def test_a_fraction_is_allocated_by_the_rule_and_never_passed(fraction: float, rule: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=fraction, rule=rule, sinks=0, paper=True)) as far:
        cache = far.new_cache()
        model(**SINGLE, past_key_values=cache)
        receipt = far.receipt()
    assert receipt.kept_fraction <= fraction
    held = [cache.engine.store.length(i) for i in range(4)]
    assert sum(held) == 4 * int(fraction * TOKENS)
    scores = score_plainly(model, SINGLE)
    gains = np.stack([curve_plainly(scores[i]) for i in range(4)])
    expected = allocate(gains, tokens=sum(held) - 32, rule=rule) + 8
    assert np.abs(np.array(held) - expected).max() <= 1, "a tie of float32 and float64 at most"


def test_sinks_are_kept_and_padding_is_the_first_to_go() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=0.4)) as far:
        cache = far.new_cache()
        model(**PADDED, past_key_values=cache)
    first = PADDED["attention_mask"].argmax(-1)
    for i in range(4):
        held = places(cache.engine.store, i)
        for b in range(3):
            for row in held[b].tolist():
                assert set(range(int(first[b]), int(first[b]) + 4)) <= set(row)
                assert min(row) >= first[b], "there are enough real records, so none is padding"


def test_padding_goes_before_records_of_no_weight() -> None:
    model, prompt = make_model("llama"), make_prompt(2, tokens=TOKENS, pad=45)
    with farkv.attach(model, XKV(fraction=0.5)) as far:
        cache = far.new_cache()
        model(**prompt, past_key_values=cache)
    for i in range(4):
        held = places(cache.engine.store, i)
        for row in held[0].tolist():
            # 15 real tokens, and room for more: all of them are kept.
            assert set(range(45, TOKENS)) <= set(row)


# --- decoding stays within --------------------------------------------------------------------------------------

CAPPED: dict[str, tuple[Method, ...]] = {
    "fraction": (XKV(fraction=0.3),),
    "default": (XKV(),),
    "infinigen+keep": (InfiniGen(fraction=0.1), XKV(fraction=0.3)),
    "tokens": (XKV(tokens=60),),
    "retention": (XKV(retention=0.6),),
}


@pytest.mark.parametrize(
    ("method", "prompt_tokens"),
    [("fraction", 12), ("fraction", 120), ("default", 120), ("infinigen+keep", 12), ("tokens", 12), ("retention", 120)],
)
def test_decoding_stays_within_the_budget_for_200_tokens(method: str, prompt_tokens: int) -> None:
    model, methods, n_new = make_model("llama", num_hidden_layers=2), CAPPED[method], 200
    xkv = methods[-1]
    assert isinstance(xkv, XKV)
    ids = make_prompt(1, tokens=prompt_tokens + n_new)["input_ids"]
    with farkv.attach(model, *methods) as far:
        cache = far.new_cache()
        store = cache.engine.store
        with KeptTape(model, cache) as tape:
            forward(model, ids[:, :prompt_tokens], cache)
            first = [store.length(i) for i in (0, 1)]
            for t in range(prompt_tokens, prompt_tokens + n_new):
                forward(model, ids[:, t : t + 1], cache)
                rows = [store.length(i) for i in (0, 1)]
                read = [tape.passes[-1].reads[i][0].shape[-1] for i in (0, 1)]
                assert store.seen(0) == t + 1
                if xkv.tokens is not None:
                    assert max(sum(read), sum(rows)) <= xkv.tokens + 2 * 8
                elif xkv.retention is not None:
                    # The shares that the prompt got, of a context that grows.
                    most = [9 + (n - 8) / prompt_tokens * (t + 1) for n in first]
                    assert all(n <= m for n, m in zip(read, most, strict=True))
                elif t + 1 > (cache.engine.keeper.least + 1) / xkv.need_fraction:
                    assert max(sum(read), sum(rows)) <= xkv.need_fraction * 2 * (t + 1)
        receipt = far.receipt()
    if xkv.fraction is not None:
        assert receipt.kept_fraction <= xkv.fraction
        # Not far below either: what is evicted at once is a sixteenth.
        assert receipt.kept_fraction >= 0.85 * xkv.fraction


def test_the_published_variant_grows_by_every_token() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=0.3, paper=True)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        first = [cache.engine.store.length(i) for i in range(4)]
        for t in range(30):
            forward(model, IDS[:, t : t + 1], cache)
            assert [cache.engine.store.length(i) for i in range(4)] == [n + t + 1 for n in first]


def test_what_decoding_evicts_is_the_least_important() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(tokens=40, sinks=2)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        for t in range(40):
            forward(model, IDS[:, t : t + 1], cache)
            for i in range(4):
                held = places(cache.engine.store, i)
                seen = TOKENS + t + 1
                assert (held[..., :2] == torch.arange(2)).all(), "sinks stay"
                assert (held[..., -8:] == torch.arange(seen - 8, seen)).all(), "the newest stay"
                assert (held.diff(dim=-1) > 0).all()


# --- the prompt may come in any way -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize("chunk", [7, 12, 59])
def test_a_prompt_in_chunks_keeps_what_one_pass_keeps(chunk: int, plan: bool) -> None:
    # Of 61 tokens, chunks of 12 leave a last one of a single token.
    model, tokens = make_model("llama"), make_prompt(1, tokens=61)["input_ids"][0].tolist()
    made = make_shares(model, keep=(0.3, 0.5, 0.4, 0.6)) if plan else None
    held = []
    with farkv.attach(model, XKV() if plan else XKV(fraction=0.4), plan=made) as far:
        for n in (len(tokens), chunk):
            cache = far.new_cache()
            prefill(far, cache, tokens, n, Listener())
            store = cache.engine.store
            assert cache.get_seq_length() == 61
            held.append([places(store, i) for i in range(4)])
    for one, many in zip(*held, strict=True):
        assert one.shape == many.shape
        # A prompt that passes by is chosen from by float32 scores, one that is stored by its bfloat16 marks.
        differ = (one[..., None] != many[..., None, :]).all(-1).sum(-1).max()
        assert differ <= (1 if plan else 0)


def test_nothing_is_evicted_before_the_prompt_has_ended() -> None:
    model, tokens = make_model("llama"), make_prompt(1, tokens=60)["input_ids"][0].tolist()
    lengths = []
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        cache = far.new_cache()
        prefill(far, cache, tokens, 13, Listener(lambda *_: lengths.append(cache.engine.store.length(0))))
    assert lengths[:-1] == [13, 26, 39, 52]
    assert lengths[-1] < 30


@pytest.mark.parametrize("n", [1, 2, 9, 12])
def test_short_prompts(n: int) -> None:
    model = make_model("llama")
    for name in ("xkv", "infinigen+keep"):
        with farkv.attach(model, *METHODS[name]) as far:
            cache = far.new_cache()
            with KeptTape(model, cache) as tape:
                forward(model, IDS[:, :n], cache)
                steps(model, cache, IDS[:, n : n + 14])
        assert cache.get_seq_length() == n + 14
        if any(cache.engine.store.evicted.values()):
            check_replay(model, tape)


# --- the cache's state ------------------------------------------------------------------------------------------


def test_batch_operations_keep_rows_places_and_marks_together() -> None:
    model = make_model("llama")
    plain = model(input_ids=IDS).past_key_values
    with farkv.attach(model, XKV(fraction=0.4)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        store = cache.engine.store
        before = [(places(store, i), store.kept[i].marks.view().clone()) for i in range(4)]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        order = torch.tensor([1, 0, 0])
        for i, (held, marks) in enumerate(before):
            assert torch.equal(places(store, i), held[order])
            assert torch.equal(store.kept[i].marks.view(), marks[order])
            at = held[order][..., None].expand(-1, -1, -1, 8)
            assert torch.equal(store.keys(i), plain.layers[i].keys[order].gather(2, at))
            assert torch.equal(store.records(i)[1], plain.layers[i].values[order].gather(2, at))
        # And what comes after is evicted per sequence.
        alone = steps(model, cache, IDS[order, :25])
        cache2 = far.new_cache()
        forward(model, IDS[order], cache2)
        fresh = steps(model, cache2, IDS[order, :25])
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(alone, fresh, strict=True))


@pytest.mark.parametrize("methods", [METHODS["xkv"], METHODS["infinigen+keep"]], ids=["xkv", "infinigen+keep"])
def test_copies_evict_on_their_own(methods: Any) -> None:
    model = make_model("llama")
    with farkv.attach(model, *methods, near="1MiB") as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        twin = copy.deepcopy(cache)
        expected = steps(model, cache, IDS[:, :20])
        assert all(torch.equal(a, b) for a, b in zip(steps(model, twin, IDS[:, :20]), expected, strict=True))
        for i in range(4):
            assert torch.equal(places(cache.engine.store, i), places(twin.engine.store, i))
        cache.reset()
        assert cache.engine.store.near.used == cache.engine.store.host.used == 0
        assert twin.engine.store.near.used > 0


def test_tokens_can_be_taken_back_as_far_as_nothing_was_evicted_before_them() -> None:
    model = make_model("llama")
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        store = cache.engine.store
        for n in (9, 60):
            with pytest.raises(CacheStateError, match="at most 8 tokens to take back"):
                cache.crop(-n)
            assert cache.get_seq_length() == TOKENS
        before = places(store, 0)
        cache.crop(-8)
        assert cache.get_seq_length() == TOKENS - 8
        assert torch.equal(places(store, 0), before[..., :-8])
        steps(model, cache, IDS[:, :2])
        assert (places(store, 0)[..., -2:] == torch.tensor([TOKENS - 8, TOKENS - 7])).all()


def test_what_was_taken_back_scores_nothing() -> None:
    # The window of queries goes back with the tokens: a crop and the same tokens again evict the same records.
    model, ids = make_model("llama"), make_prompt(1, tokens=100)["input_ids"]
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        kept = []
        for detour in (False, True):
            cache = far.new_cache()
            forward(model, ids[:, :60], cache)
            if detour:
                steps(model, cache, ids[:, 90:93])
                cache.crop(-3)
            steps(model, cache, ids[:, 60:72])
            kept.append([places(cache.engine.store, i) for i in range(4)])
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)


def test_a_reset_cache_forgets_the_last_prompt() -> None:
    model, tokens = make_model("llama"), make_prompt(1, tokens=200)["input_ids"][0].tolist()
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        cache = far.new_cache()
        prefill(far, cache, tokens, 64, Listener())
        cache.reset()
        forward(model, SINGLE["input_ids"], cache)
        # The prompt that was announced before the reset is not waited for.
        assert cache.engine.store.length(0) < TOKENS
