"""The model's own indexer as a selector: it reads what the plain model's own choice shows, and nothing else travels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import farkv
from farkv.errors import CapacityError, ConfigError, SessionError
from farkv.methods import Indexer
from tests.hf.tape import Tape
from tests.models import assert_same, forward, generate, make_model, make_prompt, plain_cache

pytestmark = pytest.mark.skipif(not hasattr(transformers, "Qwen4ExpTextConfig"), reason="no model with such an indexer")

BUDGET, BLOCK = 16, 4
PROMPTS = {"alone": make_prompt(tokens=40), "padded": make_prompt(3, tokens=40, pad=9)}
every_prompt = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)


def make(**changes: Any) -> Any:
    return make_model("qwen4_exp", **changes)


def places(name: str, folder: Path) -> dict[str, Any]:
    """Return the options of `attach` by a short name."""
    disk, near = {"disk": f"{folder}:4MiB"}, {"near": "1MiB"}
    found: dict[str, dict[str, Any]] = {"in_place": {}, "native": {"kernel": "native"}, "near": near, "disk": disk}
    found |= {"host": near | {"host": "1MiB"}, "disk+near": disk | near}
    return found[name]


@contextmanager
def listen(model: Any) -> Iterator[list[dict[int, Tensor]]]:
    """Note which tokens the model's indexers choose in every decode step, by layer."""
    chosen: list[dict[int, Tensor]] = []

    def note(module: Any, args: Any, shown: Tensor) -> None:
        if shown.shape[2] == 1 and shown.shape[3] > 1:
            if not chosen or module.layer_idx in chosen[-1]:
                chosen.append({})
            chosen[-1][module.layer_idx] = shown[:, 0, 0]

    hooks = [m.register_forward_hook(note) for n, m in model.named_modules() if n.endswith(".indexer")]
    yield chosen
    for hook in hooks:
        hook.remove()


def differ(ours: Any, plain: Any) -> float:
    """Return the largest difference of logits, where the tokens are the same."""
    assert torch.equal(ours.sequences, plain.sequences)
    return max(float((a - b).abs().max()) for a, b in zip(ours.logits, plain.logits, strict=True))


# --- it is the plain model ----------------------------------------------------------------------------------------


@every_prompt
@pytest.mark.parametrize("place", ["in_place", "native", "near", "host", "disk", "disk+near"])
def test_it_reads_what_the_plain_model_chooses_and_no_more(prompt: Any, place: str, tmp_path: Path) -> None:
    model = make()
    with listen(model) as chosen:
        plain = generate(model, prompt, n=14)
    with farkv.attach(model, Indexer(), **places(place, tmp_path)) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            ours = generate(model, prompt, cache, n=14)
        receipt = far.receipt()
    assert differ(ours, plain) < 1e-4
    assert receipt.exact == "rounding"
    steps = tape.decode()
    assert len(steps) == len(chosen) == 13
    newest_is_hidden = read = 0
    for step, shown in zip(steps, chosen, strict=True):
        assert step.reads.keys() == shown.keys() == set(range(4))
        for layer, (positions, valid) in step.reads.items():
            keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            found = torch.zeros(*positions.shape[:2], shown[layer].shape[-1]).scatter_add_(-1, positions, keep.float())
            expected = shown[layer].clone()
            newest_is_hidden += int((~expected[:, -1]).sum())
            expected[:, -1] = True
            assert torch.equal(found, expected[:, None].expand_as(found).float()), "once, by both KV heads"
            read += int(expected.sum()) * 2
    assert newest_is_hidden, "a whole number of blocks, without the last, was met"
    held = sum(4 * 2 * len(prompt["input_ids"]) * (41 + t) for t in range(13))
    assert receipt.read_fraction == pytest.approx(read / held)


@every_prompt
@pytest.mark.parametrize("place", ["in_place", "near", "disk"])
def test_a_whole_budget_is_the_plain_model_bit_for_bit(prompt: Any, place: str, tmp_path: Path) -> None:
    model = make()
    plain = generate(model, prompt)
    with farkv.attach(model, Indexer(fraction=1.0), **places(place, tmp_path)) as far:
        assert_same(generate(model, prompt, far.new_cache()), plain)
        receipt = far.receipt()
    assert (receipt.exact, receipt.read_fraction) == ("bit", 1.0)


def test_what_is_below_the_budget_is_read_whole() -> None:
    model, prompt = make(), make_prompt(tokens=8)
    plain = generate(model, prompt)
    with farkv.attach(model, Indexer()) as far:
        assert differ(generate(model, prompt, far.new_cache()), plain) < 1e-4
        assert far.receipt().read_fraction == 1.0


@every_prompt
def test_layers_of_linear_attention_are_left_and_named(prompt: Any) -> None:
    model = make_model("qwen4_exp_mixed")
    plain = generate(model, prompt, n=12)
    with farkv.attach(model, Indexer(), near="1MiB") as far:
        assert differ(generate(model, prompt, far.new_cache(), n=12), plain) < 1e-4
        rows = far.receipt().layers
    assert [row.managed for row in rows] == [False, True, False, True]
    assert "linear_attention" in str(rows[0].why)


@every_prompt
def test_eager_attention_is_followed_too(prompt: Any) -> None:
    model = make(implementation="eager")
    plain = generate(model, prompt)
    with farkv.attach(model, Indexer()) as far:
        assert differ(generate(model, prompt, far.new_cache()), plain) < 1e-4


def test_a_block_of_one_token_leaves_none_behind() -> None:
    model, prompt = make(indexer_compress_ratio=1, indexer_budget=5), PROMPTS["padded"]
    plain = generate(model, prompt, n=10)
    with farkv.attach(model, Indexer(), near="1MiB") as far:
        assert differ(generate(model, prompt, far.new_cache(), n=10), plain) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_in_passes_is_the_same_prompt(chunk: int) -> None:
    model, ids = make(), make_prompt(tokens=61)["input_ids"]
    plain = forward(model, ids, plain_cache(model))
    with farkv.attach(model, Indexer(), near="1MiB") as far:
        cache = far.new_cache()
        found = torch.cat([forward(model, part, cache) for part in ids.split(chunk, 1)], 1)
    assert (found - plain).abs().max() < 1e-4


def test_dense_passes_in_blocks_follow_the_choice() -> None:
    model, ids = make(), make_prompt(tokens=300)["input_ids"]
    whole = plain_cache(model)
    sizes = [*[50] * 5, 40, *[1] * 10]
    plain = [forward(model, part, whole) for part in ids.split(sizes, 1)]
    with farkv.attach(model, Indexer(), near=80_000) as far:
        cache = far.new_cache(tokens=300, chunk_tokens=50)
        found, streams = [], []
        for part in ids.split(sizes, 1):
            found.append(forward(model, part, cache))
            streams.append(cache.engine.store.streams)
        assert streams[5], "the last pass of the prompt goes block by block"
        assert cache.engine.store.near.peak <= 80_000
        assert far.receipt().exact == "rounding"
    assert max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)) < 1e-4


def test_beams_are_followed() -> None:
    model, prompt = make(), PROMPTS["padded"]
    plain = generate(model, prompt, n=8, num_beams=3)
    with farkv.attach(model, Indexer(), near="1MiB") as far:
        assert torch.equal(generate(model, prompt, far.new_cache(), n=8, num_beams=3).sequences, plain.sequences)


def test_coded_records_are_read_by_the_same_choice() -> None:
    model, prompt = make(), PROMPTS["padded"]
    with farkv.attach(model, Indexer(), quant="int8") as far:
        generate(model, prompt, far.new_cache())
        assert far.receipt().exact == "no"
        assert 0.2 < far.receipt().read_fraction < 0.5


def test_verified_steps_are_compared_with_the_plain_model() -> None:
    model, prompt = make(), PROMPTS["padded"]
    quality = {}
    for fraction in (None, 0.2):
        with farkv.attach(model, Indexer(fraction=fraction), near="1MiB") as far:
            generate(model, prompt, far.new_cache(verify=4), n=8)
            quality[fraction] = far.receipt().quality
    assert quality[None].steps == quality[0.2].steps == 4 * 3
    assert quality[None].kl_mean < 1e-6
    assert quality[None].mass_min == pytest.approx(1.0, abs=1e-5)
    assert quality[0.2].kl_mean > 1e-3
    assert quality[0.2].mass_mean < 0.99


# --- a cap below the model's budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.15, 0.25, 0.3, 0.38])
def test_a_cap_is_kept_by_every_sequence_with_the_models_best_blocks(fraction: float, near: str | None) -> None:
    model, prompt = make(), make_prompt(3, tokens=43, pad=12)
    with farkv.attach(model, Indexer(fraction=fraction), near=near) as far:
        cache = far.new_cache()
        with Tape(model, cache) as tape:
            generate(model, prompt, cache, n=9)
        receipt = far.receipt()
    assert receipt.peak_read_fraction <= max(fraction, 1 / 43) + 1e-9
    assert receipt.exact == "no"
    real = prompt["attention_mask"].sum(1)
    for t, step in enumerate(tape.decode()):
        n = (real + t + 1).tolist()
        for layer, (positions, valid) in step.reads.items():
            keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            for b, tokens in enumerate(n):
                cap = max(1, int(fraction * tokens + 1e-9))
                assert 1 <= int(keep[b, 0].sum()) <= cap
                if cap > BLOCK + tokens % BLOCK and cap < BUDGET:
                    assert int(keep[b, 0].sum()) > cap - BLOCK - 1, "no block more would have fitted"
            assert torch.equal(positions[:, 0], positions[:, 1])
            if layer == 0 and t == 0:
                made = generate(model, prompt, n=1).sequences
                check_best(model, prompt, made, (positions[:, 0], keep[:, 0]), fraction)


def check_best(model: Any, prompt: Any, made: Tensor, reads: tuple[Tensor, Tensor], fraction: float) -> None:
    """Compare the first step's reads of the first layer with a model of a smaller budget."""
    n_tokens, positions = prompt["input_ids"].shape[1], reads[0]
    for b, tokens in enumerate((prompt["attention_mask"].sum(1) + 1).tolist()):
        cap = max(1, int(fraction * tokens + 1e-9))
        blocks = (cap - (tokens % BLOCK or 1)) // BLOCK
        found = set(positions[b][reads[1][b]].tolist())
        if blocks < 1:
            assert found == set(range(n_tokens + 1 - cap, n_tokens + 1)), "the newest"
            continue
        smaller = copy.deepcopy(model)
        cache = plain_cache(smaller)
        mask = torch.cat([prompt["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        first = (mask.cumsum(-1) - 1).clamp_min(0)[:, :n_tokens]
        smaller(**prompt, position_ids=first, past_key_values=cache)
        for layer in smaller.model.layers:
            layer.self_attn.indexer.block_topk = min(blocks, BUDGET // BLOCK)
        at = (mask.cumsum(-1) - 1)[:, -1:]
        with listen(smaller) as chosen:
            new = made[:, n_tokens : n_tokens + 1]
            smaller(input_ids=new, attention_mask=mask, position_ids=at, past_key_values=cache)
        assert found == {*chosen[0][0][b].nonzero()[:, 0].tolist(), n_tokens}


def test_a_cap_above_the_models_budget_changes_nothing() -> None:
    model, prompt = make(), PROMPTS["padded"]
    plain = generate(model, prompt)
    with farkv.attach(model, Indexer(fraction=0.9)) as far:
        assert differ(generate(model, prompt, far.new_cache()), plain) < 1e-4
        assert far.receipt().exact == "rounding"


# --- bytes --------------------------------------------------------------------------------------------------------


def test_its_keys_are_counted_and_what_travels_is_what_is_chosen() -> None:
    model, ids = make(), make_prompt(2, tokens=200)["input_ids"]
    with farkv.attach(model, Indexer(), near="1MiB") as far:
        cache = far.new_cache(tokens=210, batch=2)
        forward(model, ids, cache)
        cache.engine.store.drop_recently_used()
        for t in range(5):
            forward(model, ids[:, t : t + 1], cache)
        receipt = far.receipt()
    keys, positions = 4 * 2 * 210 * 8 * 4, 2 * 210 * 3 * 8
    assert receipt.kv_bytes.index_peak == keys + positions
    assert receipt.index_fraction == pytest.approx(8 * 4 / (2 * 2 * 8 * 4), rel=0.01)
    most = 4 * 2 * 2 * (BUDGET + BLOCK - 1) * 2 * 8 * 4
    assert 0 < receipt.fetched_bytes_per_token <= most
    assert "nothing is fetched ahead" in receipt.notes[0]


@pytest.mark.parametrize("tokens", [0, 130])
def test_its_near_limit_is_hard(tokens: int) -> None:
    model, ids = make(), make_prompt(tokens=130)["input_ids"]
    admitted = []
    for near in range(2_000, 100_000, 7_000):
        with farkv.attach(model, Indexer(), near=near) as far:
            try:
                cache = far.new_cache(tokens=tokens, chunk_tokens=20)
                for part in ids.split([*[20] * 5, *[1] * 30], 1):
                    forward(model, part, cache)
                admitted.append(near)
            except CapacityError:
                assert not admitted, "what fits in less fits in more"
            assert cache.engine.store.near.peak <= near if admitted else True
    assert 2_000 not in admitted
    assert admitted


# --- sessions and joining -----------------------------------------------------------------------------------------


def test_a_saved_text_goes_on_as_if_it_had_just_been_read(tmp_path: Path) -> None:
    model, ids = make(), make_prompt(tokens=90)["input_ids"]
    with farkv.attach(model, Indexer()) as far:
        cache = far.new_cache()
        forward(model, ids[:, :80], cache)
        cache.save(tmp_path / "text.farkv")
        expected = [forward(model, ids[:, t : t + 1], cache) for t in range(80, 90)]
        again = farkv.load_cache(tmp_path / "text.farkv", model)
        found = [forward(model, ids[:, t : t + 1], again) for t in range(80, 90)]
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5
    with farkv.attach(model, Indexer(fraction=0.1)) as far:
        assert farkv.load_cache(tmp_path / "text.farkv", model).get_seq_length() == 80
    with farkv.attach(model, farkv.Full()), pytest.raises(SessionError, match="layers"):
        farkv.load_cache(tmp_path / "text.farkv", model)


@pytest.mark.parametrize("change", ["shape", "nan", "name"])
def test_keys_that_are_no_keys_of_the_text_are_refused(change: str) -> None:
    model, ids = make(), make_prompt(tokens=30)["input_ids"]
    with farkv.attach(model, Indexer()) as far:
        cache, other = far.new_cache(), far.new_cache()
        for each in (cache, other):
            forward(model, ids, each)
        selector = cache.engine.selector
        tensors = selector.list_tensors(cache.engine.records)
        for each in other.engine.selector.index.values():
            each.clear()
        if change == "shape":
            tensors["2/keys"] = tensors["2/keys"][:, :, :-1]
        elif change == "nan":
            tensors["2/keys"][0, 0, 0, 0] = torch.nan
        else:
            tensors["9/keys"] = tensors.pop("2/keys")
        with pytest.raises(SessionError, match="make it anew"):
            other.engine.selector.take_tensors(tensors, torch.float32, other.engine.records)


def test_joined_caches_go_on_as_each_alone() -> None:
    model = make()
    texts = [make_prompt(tokens=n, seed=n)["input_ids"] for n in (41, 58)]
    more = make_prompt(2, tokens=9, seed=3)["input_ids"]
    alone = []
    for b, text in enumerate(texts):
        cache = plain_cache(model)
        forward(model, text, cache)
        alone.append([forward(model, more[b : b + 1, t : t + 1], cache) for t in range(9)])
    with farkv.attach(model, Indexer()) as far:
        first, second = (far.new_cache() for _ in texts)
        for text, cache in zip(texts, (first, second), strict=True):
            forward(model, text, cache)
        first.join(second)
        mask = torch.ones(2, 58, dtype=torch.long)
        mask[0, :17] = 0
        for t in range(9):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            at = (mask.cumsum(-1) - 1)[:, -1:]
            step = {"input_ids": more[:, t : t + 1], "attention_mask": mask, "position_ids": at}
            found = model(**step, past_key_values=first).logits
            assert (found - torch.cat([alone[0][t], alone[1][t]])).abs().max() < 1e-4


# --- what it does not take ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0, 1.5, "much", True])
def test_a_fraction_that_is_none_is_refused(fraction: Any) -> None:
    with pytest.raises(ConfigError, match="fraction"):
        Indexer(fraction=fraction)


def test_nothing_may_be_lost_of_what_the_model_chooses_from() -> None:
    model = make()
    with pytest.raises(ConfigError, match="takes no XKV and no plan"):
        farkv.attach(model, Indexer(), farkv.XKV(fraction=0.5))
    with pytest.raises(ConfigError, match="none may be lost"):
        farkv.attach(model, Indexer(), host="1MiB", evict="lru")


@pytest.mark.parametrize("fraction", [None, 0.2])
def test_guessed_tokens_are_read_in_one_pass_by_the_models_choice(fraction: float | None) -> None:
    # Hugging Face guesses nothing for a model that may have states; other doors do.
    model, ids = make(), make_prompt(tokens=60)["input_ids"]
    plain = forward(model, ids, plain_cache(model))
    with farkv.attach(model, Indexer(fraction=fraction)) as far:
        cache = far.new_cache()
        forward(model, ids[:, :57], cache)
        cache.account.prompt_tokens = 57
        assert (forward(model, ids[:, 57:], cache) - plain[:, 57:]).abs().max() < 1e-4
        assert far.receipt().fallbacks == {"whole_guesses": 1}
