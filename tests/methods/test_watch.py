"""An index is looked at for drift at fixed numbers of tokens, and fitted again where it has become worse."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import farkv
from farkv.math.drift import EVERY, QUERIES
from farkv.methods import InfiniGen, LowBit
from farkv.methods.watch import NEVER, Watch, crop_watch, find_woken, join_watches, keep_newest, note_shares, rest
from tests.methods.test_indexed import check_codes
from tests.models import forward, make_model

PROMPT = 300
METHODS: dict[str, Any] = {
    "ours": InfiniGen(fraction=0.1, columns=6),
    "profile": InfiniGen(fraction=0.1, columns=6),
    "lowbit": LowBit(fraction=0.1),
}
PLACES: dict[str, dict[str, str]] = {
    "in_place": {},
    "near": {"near": "224KiB"},
    "disk": {"near": "224KiB", "host": "256KiB", "disk": "DIR:16MiB"},
}


def make_words(first: int, last: int, n: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randint(first, last, (batch, n), generator=torch.Generator().manual_seed(seed))


# Few words, and later others: what is appended is not like the prompt.
TEXT = torch.cat([make_words(1, 4, PROMPT), make_words(60, 97, EVERY + 40)], 1)


def decode(model: Any, cache: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Feed tokens one by one; return the last logits."""
    logits = torch.empty(0)
    for t in range(ids.shape[1]):
        logits = model(input_ids=ids[:, t : t + 1], past_key_values=cache, **inputs).logits[:, -1]
    return logits


def phases(cache: Any) -> list[Any]:
    return [fit.phase for fit in cache.engine.selector.fits.values()]


def projections(cache: Any) -> list[Any]:
    return [fit.index.projection for fit in cache.engine.selector.fits.values()]


# --- when -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_the_newest_queries_are_kept_however_they_came(sizes: list[int]) -> None:
    q = torch.randn(2, 3, sum(sizes), 4)
    watch = Watch()
    for part in q.split(sizes, 2):
        watch = keep_newest(watch, part)
    newest = watch.get_newest()
    assert newest is not None
    assert torch.equal(newest, q[:, :, -QUERIES:])
    assert sum(part.shape[2] for part in watch.queries) == watch.n_queries < QUERIES + max(sizes)


def test_it_sleeps_until_the_first_sequence_is_due() -> None:
    watch = note_shares(Watch(), {0: 0.2, 1: 0.3}, [1000, 500], fitted=True)
    watch = rest(watch, [1000, 500], 1000, [False, False])
    assert (watch.at, watch.wake, watch.asleep) == ([1256, 756], 1256, 1256 - QUERIES)
    assert find_woken(watch, [1256, 756]) == [], "without queries there is nothing to look at"
    watch = keep_newest(watch, torch.randn(2, 2, QUERIES, 4))
    assert find_woken(watch, [1255, 755]) == []
    assert find_woken(watch, [1256, 755]) == [0]
    seen = rest(note_shares(watch, {0: 0.9}, [1256, 755], fitted=False), [1256, 755], 1256, [False, False])
    assert seen.shares == [0.2, 0.3]
    assert (seen.at, seen.wake) == ([1256 + EVERY, 756], 1257)
    assert seen.n_queries == QUERIES, "it is soon due"
    assert note_shares(Watch([math.nan]), {0: 0.4}, [9], fitted=False).shares == [0.4], "the first look knows"
    # Of a long text all fits together code every token anew about sixteen times.
    assert rest(note_shares(Watch(), {0: 0.2}, [64_000], fitted=True), [64_000], 64_000, [False]).wake == 68_000


def test_a_young_sequence_keeps_it_awake_and_a_crop_looks_again_soon() -> None:
    watch = note_shares(Watch(), {0: 0.2}, [30], fitted=True)
    watch = rest(watch, [30], 30, [True])
    assert (watch.wake, watch.asleep) == (NEVER, 0)
    old = rest(note_shares(Watch(), {0: 0.2}, [9000], fitted=True), [9000], 9000, [False])
    cut = crop_watch(old, 2000)
    assert cut.wake == 2000 + EVERY
    assert rest(cut, [2100], 2100, [False]).at == [2100 + EVERY]
    assert join_watches(old, Watch(), (1, 2)).at == [*old.at, 0, 0]


# --- a text that drifts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["turns", "generated"])
@pytest.mark.parametrize(("method", "place"), [*((m, "in_place") for m in METHODS), ("ours", "near"), ("ours", "disk")])
def test_other_text_is_fitted_to(method: str, place: str, way: str, tmp_path: Path) -> None:
    model = make_model("llama", max_position_embeddings=2048)
    profile = farkv.profile(model, [TEXT[0, :100]]) if method == "profile" else False
    limits: Any = {name: value.replace("DIR", str(tmp_path)) for name, value in PLACES[place].items()}
    with farkv.attach(model, METHODS[method], profile=profile, **limits) as far:
        cache = far.new_cache(tokens=TEXT.shape[1] + 2)
        forward(model, TEXT[:, :PROMPT], cache)
        first = decode(model, cache, TEXT[:, PROMPT : PROMPT + 1])
        assert first.isfinite().all()
        before = projections(cache)
        rest_of_it = TEXT[:, PROMPT + 1 :]
        if way == "turns":
            for part in rest_of_it.split(EVERY // 2, 1):
                forward(model, part, cache)
                decode(model, cache, part[:, :1])
        else:
            decode(model, cache, rest_of_it)
        receipt = far.receipt(cache)
        assert receipt.fallbacks["refit"] >= 1
        changed = [i for i, (a, b) in enumerate(zip(before, projections(cache), strict=True)) if a is not b]
        assert changed, "a layer was fitted again"
        for i in changed:
            assert phases(cache)[i].fitted[0] > PROMPT
        if place != "disk":
            check_codes(cache)
        assert not limits or receipt.kv_bytes.near_peak <= 224 * 1024


def test_a_pass_that_is_taken_back_takes_its_fit_back() -> None:
    model = make_model("llama", max_position_embeddings=2048)

    def fail(module: Any, args: Any, out: Any) -> None:
        raise InterruptedError

    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        cache = far.new_cache()
        forward(model, TEXT[:, :PROMPT], cache)
        decode(model, cache, TEXT[:, PROMPT : PROMPT + EVERY - 3])
        refitted = 0
        for t in range(PROMPT + EVERY - 3, PROMPT + EVERY + 3):
            token = TEXT[:, t : t + 1]
            calm, before = copy.deepcopy(cache), (phases(cache), projections(cache))
            hook = model.model.layers[3].mlp.register_forward_hook(fail)
            with pytest.raises(InterruptedError):
                forward(model, token, cache)
            hook.remove()
            now = (phases(cache), projections(cache))
            assert all(a is b for mine, old in zip(now, before, strict=True) for a, b in zip(mine, old, strict=True))
            expected = forward(model, token, calm)
            assert (forward(model, token, cache) - expected).abs().max() <= 1e-4 * expected.abs().max()
            refitted += projections(cache)[1] is not before[1][1]
        assert refitted


def test_a_sequence_of_a_batch_is_fitted_again_as_it_is_alone() -> None:
    model = make_model("llama", max_position_embeddings=2048)
    prompts = [TEXT[0, :PROMPT], make_words(1, 4, PROMPT - 90, seed=8)[0], make_words(1, 9, 40, seed=9)[0]]
    more = make_words(60, 97, EVERY + 20, seed=5, batch=3)
    n = max(map(len, prompts))
    pads = [n - len(p) for p in prompts]
    ids = torch.stack([torch.nn.functional.pad(p, (pad, 0)) for p, pad in zip(prompts, pads, strict=True)])
    mask = (torch.arange(n) >= torch.tensor(pads)[:, None]).long()
    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        together = far.new_cache()
        run_padded(model, together, ids, mask, more)
        for i, prompt in enumerate(prompts):
            alone = far.new_cache()
            run_padded(model, alone, prompt[None], torch.ones_like(prompt)[None], more[i : i + 1])
            for mine, own in zip(
                together.engine.selector.fits.values(), alone.engine.selector.fits.values(), strict=True
            ):
                assert mine.phase.fitted[i] == own.phase.fitted[0]
                assert mine.phase.watch.at[i] == own.phase.watch.at[0]
                assert mine.phase.watch.shares[i] == pytest.approx(own.phase.watch.shares[0], rel=0.02)
    assert far.receipt(together).fallbacks["refit"] >= 1


def run_padded(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, more: torch.Tensor) -> None:
    """Read prompts, then known tokens one by one."""
    for part in (ids, *more.split(1, 1)):
        n = part.shape[1]
        mask = mask if n > 1 else torch.nn.functional.pad(mask, (0, 1), value=1)
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -n:]
        model(input_ids=part, attention_mask=mask, position_ids=places, past_key_values=cache)


def test_a_loaded_session_knows_how_good_its_index_was(tmp_path: Path) -> None:
    model = make_model("llama", max_position_embeddings=2048)
    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        cache = far.new_cache()
        forward(model, TEXT[:, :PROMPT], cache)
        cache.save(tmp_path / "text")
        loaded = farkv.load_cache(tmp_path / "text", model, tokens=TEXT.shape[1] + 4)
        for mine, again in zip(phases(cache), phases(loaded), strict=True):
            assert again.watch.shares == pytest.approx(mine.watch.shares)
            assert (again.watch.wake, again.watch.at) == (PROMPT + EVERY, [PROMPT + EVERY])
        forward(model, TEXT[:, PROMPT:], loaded)
        decode(model, loaded, TEXT[:, :1])
        assert far.receipt(loaded).fallbacks["refit"] >= 1


def test_an_ordinary_step_changes_nothing_that_is_known() -> None:
    model = make_model("llama", max_position_embeddings=2048)
    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        cache = far.new_cache()
        forward(model, TEXT[:, :PROMPT], cache)
        decode(model, cache, TEXT[:, :1])
        before = phases(cache)
        decode(model, cache, TEXT[:, 1 : EVERY - QUERIES])
        assert all(a is b for a, b in zip(phases(cache), before, strict=True))
