"""A full pool: who goes and who never does, what is counted, and that attention sees exactly who is left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError, CapacityError
from farkv.methods import Full, InfiniGen, Method, Oracle, Window
from farkv.store.far.eviction import POLICIES
from farkv.store.far.kept import ROW_BYTES
from tests.hf.tape import Tape, check_replay
from tests.models import VOCAB, forward, make_model, make_prompt

LAYERS, CAPACITY, CHUNK = 2, 32, 8
# K and V of one head, float32, with place, score and the policy's use.
ROW = 2 * 8 * 4 + ROW_BYTES + 4
# 4 bits a column, of 8 at least.
INDEX = 4
METHODS: dict[str, Method] = {
    "full": Full(),
    "ours": InfiniGen(fraction=0.3),
    "window": Window(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
}


def tiny() -> Any:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    return make_model("llama", num_hidden_layers=LAYERS, **shape)


def count_limit(capacity: int = CAPACITY, batch: int = 1) -> int:
    """Return the host limit of this capacity: while a layer grows, its old rows are still there.

    An index counts too, and the records of a layer that are gathered to be read.
    """
    return (LAYERS + 1) * batch * (ROW + INDEX) * (capacity + 1) + 2 * 8 * 4 * batch * (capacity + 1)


def read(model: Any, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None, chunk: int = CHUNK) -> Any:
    """Read a prompt in chunks."""
    out = None
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        inputs = {} if mask is None else {"attention_mask": mask[:, : start + part.shape[1]]}
        out = model(input_ids=part, past_key_values=cache, use_cache=True, **inputs).logits
        check(cache)
    return out


def check(cache: Any) -> None:
    """The numbers agree with one another, sinks and the newest are there, and the limit holds."""
    engine = cache.engine
    store, policy = engine.store, engine.parts.eviction.policy
    assert store.host.peak <= store.host.limit
    for layer in range(LAYERS):
        n_rows, seen = store.length(layer), store.seen(layer)
        assert n_rows <= policy.capacity
        assert store.evicted[layer] == seen - n_rows
        places = store.kept[layer].places.view()[..., 0]
        assert (places.diff(dim=-1) > 0).all(), "every record is there once, in the order of the text"
        assert (places[..., -1] == seen - 1).all()
        recent = min(policy.recent, seen)
        assert torch.equal(places[..., -recent:], torch.arange(seen - recent, seen).expand(places[..., -recent:].shape))
        if engine.padding.real is None:
            sinks = min(policy.sinks, n_rows)
            assert torch.equal(places[..., :sinks], torch.arange(sinks).expand(places[..., :sinks].shape))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_pool_stays_within_its_limit_and_keeps_whom_it_must(method: str, policy: str) -> None:
    model = tiny()
    with farkv.attach(model, METHODS[method], host=count_limit(), evict=policy) as far:
        cache = far.new_cache()
        ids = make_prompt(1, tokens=44)["input_ids"]
        read(model, ids, cache)
        for token in torch.randint(1, VOCAB, (10, 1, 1)):
            model(input_ids=token, past_key_values=cache)
            check(cache)
        receipt = far.receipt(cache)
        assert cache.get_seq_length() == 54
        lengths = [cache.engine.store.length(i) for i in range(LAYERS)]
        assert receipt.evicted_records == sum(54 - n for n in lengths)
        assert receipt.kv_bytes.host_peak <= count_limit()
        cache.reset()
        assert cache.engine.store.host.used == cache.engine.store.near.used == 0
        read(model, ids[:, :CHUNK], cache)


@pytest.mark.parametrize("n_prompt", range(CAPACITY - 1, CAPACITY + 2))
@pytest.mark.parametrize("method", ["full", "ours"])
@pytest.mark.parametrize("reserve", [0, 60])
def test_a_prompt_that_just_fits_is_decoded_on(n_prompt: int, method: str, reserve: int) -> None:
    model = tiny()
    with farkv.attach(model, METHODS[method], host=count_limit(), evict="lru") as far:
        cache = far.new_cache(tokens=reserve)
        read(model, make_prompt(1, tokens=n_prompt)["input_ids"], cache, chunk=n_prompt)
        for token in torch.randint(1, VOCAB, (4, 1, 1)):
            model(input_ids=token, past_key_values=cache)
            check(cache)


@pytest.mark.parametrize("policy", ["lru", "score", "clock"])
def test_padding_goes_before_any_record(policy: str) -> None:
    model, prompt = tiny(), make_prompt(2, tokens=48, pad=20)
    with farkv.attach(model, METHODS["ours"], host=count_limit(batch=2), evict=policy) as far:
        cache = far.new_cache()
        mask = prompt["attention_mask"]
        read(model, prompt["input_ids"], cache, mask)
        store = cache.engine.store
        for layer in range(LAYERS):
            places = store.kept[layer].places.view()[0, ..., 0].long()
            n_real = int(mask[0].sum())
            real_left = int(mask[0][places].sum(-1).min())
            pads_left = places.shape[-1] - real_left
            assert pads_left == 0 or real_left == n_real


def test_a_crop_takes_back_only_what_nothing_was_taken_from() -> None:
    model = tiny()
    with farkv.attach(model, METHODS["ours"], host=count_limit(), evict="lru") as far:
        cache = far.new_cache()
        ids = make_prompt(1, tokens=60)["input_ids"]
        read(model, ids[:, :56], cache)
        store = cache.engine.store
        gapless = min(store.kept[i].gapless for i in range(LAYERS))
        assert gapless >= CHUNK
        before = [store.kept[i].places.view().clone() for i in range(LAYERS)]
        cache.crop(-CHUNK)
        # What left the window may have gone before the window came back to it.
        assert cache.get_seq_length() == 56 - CHUNK
        # The same tokens again: the same records, though others may have gone for them.
        read(model, ids[:, 48:56], cache)
        for i in range(LAYERS):
            assert torch.equal(store.kept[i].places.view(), before[i])
        most = max(store.kept[i].gapless for i in range(LAYERS))
        with pytest.raises(CacheStateError, match="take back"):
            cache.crop(-most - 1)


def test_a_pass_that_cannot_fit_is_refused_before_anything_is_stored() -> None:
    model = tiny()
    with farkv.attach(model, METHODS["ours"], host=count_limit(), evict="lru") as far:
        cache = far.new_cache()
        ids = make_prompt(1, tokens=200)["input_ids"]
        with pytest.raises(CapacityError, match="prefill_chunk_size"):
            forward(model, ids[:, :100], cache)
        assert cache.engine.store.host.used == cache.get_seq_length() == 0
        read(model, ids[:, :40], cache)
        used = cache.engine.store.host.used
        with pytest.raises(CapacityError, match="prefill_chunk_size"):
            forward(model, ids[:, :CAPACITY], cache)
        assert cache.get_seq_length() == 40
        assert cache.engine.store.host.used == used
        read(model, ids[:, 40:], cache)


class RowTape(Tape):
    """Records tokens, not rows; of dense passes, too, which records there were."""

    def __enter__(self) -> RowTape:
        super().__enter__()
        engine = self.cache.engine
        attend = engine.attend

        def record_attend(layer: int, step: Any, kernel: Any) -> Any:
            store = engine.store
            n_rows, (batch, heads) = store.length(layer), store.heads(layer)
            if store.evicted[layer] and step.n_new > 1:
                rows = torch.arange(n_rows).expand(batch, heads, -1)
                self.passes[-1].reads[layer] = (store.locate(layer, rows).clone(), None)
            return attend(layer, step, kernel)

        engine.attend = record_attend
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        del self.cache.engine.attend


@pytest.mark.parametrize(
    ("method", "policy", "near"),
    [(m, p, None) for m in METHODS for p in ("lru", "score")]
    + [("ours", p, "1MiB") for p in POLICIES]
    + [("full", "lru", "1MiB")],
)
def test_attention_sees_exactly_the_records_that_are_left(method: str, policy: str, near: str | None) -> None:
    model, prompt = tiny(), make_prompt(2, tokens=48, pad=14)
    reference = copy.deepcopy(model)
    with farkv.attach(model, METHODS[method], host=count_limit(batch=2), evict=policy, near=near) as far:
        cache = far.new_cache()
        with RowTape(model, cache) as tape:
            mask = prompt["attention_mask"]
            read(model, prompt["input_ids"], cache, mask)
            for token in torch.randint(1, VOCAB, (5, 2, 1)):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                model(input_ids=token, attention_mask=mask, past_key_values=cache)
                check(cache)
    check_replay(reference, tape)


def test_the_token_after_a_prompt_that_fills_the_pool_has_room() -> None:
    # Announced, the pool is allocated at once: no layer could grow for one token more.
    model, ids = make_model("llama"), make_prompt(1, tokens=96)["input_ids"]
    for host in range(30_000, 60_000, 5_000):
        with farkv.attach(model, InfiniGen(fraction=0.3), host=host, evict="fifo") as far:
            cache = far.new_cache(tokens=110, chunk_tokens=16)
            for start in range(0, 96, 16):
                model(input_ids=ids[:, start : start + 16], past_key_values=cache)
            for token in ids[0, :8]:
                model(input_ids=token[None, None], past_key_values=cache)
            assert far.receipt().kv_bytes.host_peak <= host


@pytest.mark.parametrize("announced", [0, 600, 6000])
@pytest.mark.parametrize("place", [{"quant": "int8"}, {"near": 60_000}, {"near": 200_000}], ids=str)
def test_what_was_admitted_finds_room_to_its_end(place: dict[str, Any], announced: int) -> None:
    # What is beside the records (index, buffers, uses) is as large as steps of the whole context make it.
    model, ids, done = make_model("llama", max_position_embeddings=8192), make_prompt(1, tokens=320)["input_ids"], 0
    for host in range(60_000, 240_000, 30_000):
        with farkv.attach(model, InfiniGen(fraction=0.3), host=host, evict="lru", profile=False, **place) as far:
            try:
                cache = far.new_cache(tokens=announced, chunk_tokens=16)
                forward(model, ids[:, : cache.engine.announce_prompt(320, 16)], cache)
            except CapacityError:
                assert not done, "what had room has room under a larger limit"
                continue
            at = cache.get_seq_length()
            for part in ids[:, at:].split(cache.engine.announce_prompt(320, 16), 1):
                forward(model, part, cache)
            for token in ids[0, :4]:
                forward(model, token[None, None], cache)
            assert far.receipt().kv_bytes.host_peak <= host
            assert cache.engine.store.near.peak <= place.get("near", host)
            done += 1
    assert done or (announced == 6000 and place.get("near") == 60_000), "the index of a long context has no room"
