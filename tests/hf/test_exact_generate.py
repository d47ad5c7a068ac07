"""Exact generation: full attention's own tokens from sparse drafts, on every tier, for every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import ConfigError
from farkv.hf.handle import Handle
from farkv.methods import XKV, InfiniGen, Window
from tests.models import forward, generate, make_model, make_prompt, plain_cache

TIERS: dict[str, dict[str, Any]] = {
    "in place": {},
    "near": {"near": "1MiB"},
    "tight near": {"near": "48KiB"},
    "disk": {"host": "2MiB", "disk": ":64MiB"},
}
N = 24


def attach(model: Any, tmp_path: Any, tier: str = "in place", method: Any = None) -> Handle:
    options = dict(TIERS[tier])
    if "disk" in options:
        options["disk"] = f"{tmp_path}{options['disk']}"
    return farkv.attach(model, method or Window(fraction=0.1), **options)


def play(far: Handle, prompt: dict[str, Any], cache: Any, draft_tokens: int | None = 4, **options: Any) -> Any:
    return far.generate(
        **prompt, past_key_values=cache, exact=True, draft_tokens=draft_tokens, max_new_tokens=N,
        **{"do_sample": False, **options},
    )  # fmt: skip


def read_sparsely(model: Any, prompt: dict[str, Any], cache: Any) -> None:
    """Read 60 tokens densely and ten by what the method chooses."""
    forward(model, prompt["input_ids"][:, :60], cache)
    for i in range(60, 70):
        forward(model, prompt["input_ids"][:, i : i + 1], cache)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("tier", TIERS)
def test_tokens_are_those_of_full_attention(family: str, tier: str, tmp_path: Any) -> None:
    model, prompt = make_model(family), make_prompt(tokens=120)
    plain = generate(model, prompt, plain_cache(model), n=N).sequences
    with attach(model, tmp_path, tier) as far:
        cache = far.new_cache()
        ours = far.generate(
            **prompt, past_key_values=cache, exact=True, draft_tokens=3, max_new_tokens=N, do_sample=False
        )
        count = cache.account.drafts
    assert torch.equal(ours, plain)
    assert count.tried > 0
    if family == "llama":
        # A window of a tenth drafts badly: some stand, some do not.
        assert 0 < count.accepted < count.tried


@pytest.mark.parametrize("draft_tokens", [0, 1, 7, None])
def test_however_many_are_drafted_the_tokens_are_the_same(draft_tokens: int | None, tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    plain = generate(model, prompt, plain_cache(model), n=N).sequences
    with attach(model, tmp_path, method=InfiniGen(fraction=0.2)) as far:
        cache = far.new_cache()
        ours = play(far, prompt, cache, draft_tokens)
    assert torch.equal(ours, plain)
    if draft_tokens == 0:
        assert cache.account.drafts.drafted == 0


def test_the_cache_is_left_as_plain_decoding_leaves_it(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    with attach(model, tmp_path) as far:
        cache = far.new_cache()
        ids = far.generate(
            **prompt, past_key_values=cache, exact=True, draft_tokens=4, max_new_tokens=N, do_sample=False
        )
        held = cache.get_seq_length()
        assert ids.shape[1] - 1 == held
        plain = plain_cache(model)
        forward(model, ids[:, :held], plain)
        for i in far.managed:
            k, v = cache.engine.store.records(i)
            expected: Any = plain.layers[i]
            torch.testing.assert_close(k, expected.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(v, expected.values, atol=1e-5, rtol=1e-4)


def test_rows_of_a_batch_accept_their_own_counts(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(batch=3, tokens=80, pad=7)
    plain = generate(model, prompt, plain_cache(model), n=N).sequences
    with attach(model, tmp_path) as far:
        ours = play(far, prompt, far.new_cache())
    assert torch.equal(ours, plain)


def test_a_row_that_ends_is_padded(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(batch=2, tokens=80)
    free = generate(model, prompt, plain_cache(model), n=N).sequences
    end = int(free[0, 80 + 5])
    options: dict[str, Any] = {"max_new_tokens": N, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    run: Any = model.generate
    plain = run(**prompt, past_key_values=plain_cache(model), **options)
    with attach(model, tmp_path) as far:
        ours = far.generate(**prompt, past_key_values=far.new_cache(), exact=True, draft_tokens=4, **options)
    assert torch.equal(ours, plain)


def test_a_token_that_a_sparse_step_made_is_read_again(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    plain = generate(model, prompt, plain_cache(model), n=N).sequences
    with attach(model, tmp_path) as far:
        cache = far.new_cache()
        read_sparsely(model, prompt, cache)
        assert cache.engine.dense_tokens == 60
        ours = far.generate(
            **prompt, past_key_values=cache, exact=True, draft_tokens=4, max_new_tokens=N, do_sample=False
        )
    assert torch.equal(ours, plain)


class Shown:
    """A streamer that keeps what it is shown."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_shown_what_stands_and_nothing_else(tmp_path: Any) -> None:
    model, prompt, shown = make_model("llama"), make_prompt(tokens=90), Shown()
    with attach(model, tmp_path) as far:
        ours = play(far, prompt, far.new_cache(), streamer=shown)
    assert shown.tokens == ours[0].tolist()
    assert shown.ended


def test_a_seed_gives_its_text_whatever_is_drafted(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    found = []
    for draft_tokens in (0, 4):
        with attach(model, tmp_path, method=InfiniGen(fraction=1.0)) as far:
            torch.manual_seed(5)
            found.append(play(far, prompt, far.new_cache(), draft_tokens, do_sample=True, temperature=0.7, top_k=20))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"draft_tokens": -1}, "draft_tokens"),
    ],
)
def test_what_drafts_cannot_give_is_refused(options: dict[str, Any], says: str, tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=40)
    with attach(model, tmp_path) as far, pytest.raises(ConfigError, match=says):
        play(far, prompt, far.new_cache(), **options)


def test_a_method_that_evicts_is_refused(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=40)
    with attach(model, tmp_path, method=XKV(fraction=0.5)) as far, pytest.raises(ConfigError, match="evicts"):
        play(far, prompt, far.new_cache())


def test_layers_of_a_state_are_refused(tmp_path: Any) -> None:
    model, prompt = make_model("qwen3_next"), make_prompt(tokens=40)
    with attach(model, tmp_path) as far, pytest.raises(ConfigError, match="cannot forget drafted tokens"):
        play(far, prompt, far.new_cache())


def test_a_session_knows_up_to_where_it_is_dense(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    plain = generate(model, prompt, plain_cache(model), n=N).sequences
    with attach(model, tmp_path) as far:
        cache = far.new_cache()
        read_sparsely(model, prompt, cache)
        cache.save(tmp_path / "text.farkv")
        again = farkv.load_cache(tmp_path / "text.farkv", model)
        assert again.engine.dense_tokens == 60
        assert torch.equal(play(far, prompt, again), plain)
        assert again.account.exact == "no"
        cache.step_back(10)
        cache.save(tmp_path / "whole.farkv")
        whole = farkv.load_cache(tmp_path / "whole.farkv", model)
        assert whole.engine.dense_tokens > 60
        assert torch.equal(play(far, prompt, whole), plain)


def test_the_receipt_says_what_stood(tmp_path: Any) -> None:
    model, prompt = make_model("llama"), make_prompt(tokens=90)
    with attach(model, tmp_path) as far:
        cache = far.new_cache()
        play(far, prompt, cache, 3)
        receipt = far.receipt(cache)
    drafts = receipt.drafts
    assert drafts is not None and receipt.exact == "verified"
    assert drafts.acceptance == drafts.accepted / drafts.tried
    # The first token came with the prompt.
    assert drafts.tokens == N - 1 == drafts.accepted + drafts.rounds
    assert "drafts stood" in str(receipt)
    # A tenth for every draft, and everything once a round.
    assert receipt.read_fraction == pytest.approx((0.1 * drafts.drafted + drafts.rounds) / drafts.tokens, rel=0.1)
    assert receipt.generated_tokens == N
    assert receipt.to_dict()["drafts"]["rounds"] == drafts.rounds
