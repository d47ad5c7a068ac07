"""Eviction: what is read is what is kept, however the prompt comes, and the cache's state stays whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.hf.ask import Listener, prefill
from farkv.methods import XKV, InfiniGen
from tests.engine.kept import IDS, METHODS, PADDED, SINGLE, TOKENS, KeptTape, make_shares, record, steps
from tests.hf.tape import check_replay
from tests.methods.evictors import places
from tests.models import assert_same, forward, generate, make_model, make_prompt


@pytest.mark.parametrize("near", [None, "1MiB"])
def test_a_whole_budget_beside_a_whole_selector_equals_the_plain_model(near: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(3, pad=9)
    plain = generate(model, prompt)
    with farkv.attach(model, InfiniGen(fraction=1.0), XKV(fraction=1.0), near=near) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)


# --- what is read is what is kept -------------------------------------------------------------------------------


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
        # A prompt that passes by is chosen from by float32 scores, one that is stored by its bfloat16 scores.
        differ = (one[..., None] != many[..., None, :]).all(-1).sum(-1).max()
        assert differ <= (1 if plan else 0)


def test_nothing_is_evicted_before_the_prompt_has_ended() -> None:
    model, tokens = make_model("llama"), make_prompt(1, tokens=60)["input_ids"][0].tolist()
    lengths: dict[int, int] = {}
    with farkv.attach(model, XKV(fraction=0.3)) as far:
        cache = far.new_cache()
        # Told after every block, and last when the pass is over.
        prefill(far, cache, tokens, 13, Listener(lambda done, _: lengths.update({done: cache.engine.store.length(0)})))
    assert [lengths[n] for n in (13, 26, 39, 52)] == [13, 26, 39, 52]
    assert lengths[60] < 30


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


def test_batch_operations_keep_rows_places_and_scores_together() -> None:
    model = make_model("llama")
    plain = model(input_ids=IDS).past_key_values
    with farkv.attach(model, XKV(fraction=0.4)) as far:
        cache = far.new_cache()
        forward(model, IDS, cache)
        store = cache.engine.store
        before = [(places(store, i), store.kept[i].scores.view().clone()) for i in range(4)]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        order = torch.tensor([1, 0, 0])
        for i, (held, scores) in enumerate(before):
            assert torch.equal(places(store, i), held[order])
            assert torch.equal(store.kept[i].scores.view(), scores[order])
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
