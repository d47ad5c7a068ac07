"""The promises on a real model, in float32 on a CPU: bit for bit at 1.0, a fact found at 0.05, limits held."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farkv
from farkv.config import parse_bytes
from farkv.errors import CapacityError
from farkv.hf.ask import Decoding, ask
from farkv.hf.identity import digest_weights, identify_model
from farkv.hf.load import load_model
from farkv.methods import Full, InfiniGen, Method
from tests.command import farkv as command
from tests.models import assert_same, forward, generate, plain_cache
from tests.real.conftest import ask_of, draw_text

pytestmark = pytest.mark.real
WHOLE: dict[str, Method] = {"full": Full(), "ours": InfiniGen(fraction=1.0)}
QUESTION = "What is this text about?"


def batch_of(tokenizer: Any, *tokens: int) -> dict[str, Tensor]:
    """Return prompts of so many tokens, the shorter ones padded on the left."""
    texts = [draw_text(tokenizer, n, seed) for seed, n in enumerate(tokens)]
    tokenizer.padding_side = "left"
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


# --- at 1.0, bit for bit ----------------------------------------------------------------------------------------

WAYS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "greedy": ((600,), {"n": 16}, {}),
    "beams": ((300,), {"n": 8, "num_beams": 3}, {}),
    "padded batch": ((300, 170, 60), {"n": 8}, {}),
    "chunks": ((600,), {"n": 8, "prefill_chunk_size": 128}, {}),
    "near": ((600,), {"n": 8}, {"near": "24MiB"}),
    "near, beams": ((300,), {"n": 4, "num_beams": 2}, {"near": "24MiB"}),
    "disk": ((600,), {"n": 8}, {"disk": "64MiB", "host": "40MiB"}),
}


@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("way", WAYS)
def test_whole_it_is_the_plain_model(real: Any, way: str, method: str, tmp_path: Path) -> None:
    model, tokenizer = real
    tokens, options, storage = WAYS[way]
    if "disk" in storage:
        storage = {**storage, "disk": f"{tmp_path}:{storage['disk']}"}
    prompt = batch_of(tokenizer, *tokens)
    plain = generate(model, prompt, **options)
    with farkv.attach(model, WHOLE[method], **storage) as far:
        assert_same(generate(model, prompt, far.new_cache(), **options), plain)
        receipt = far.receipt()
    assert (receipt.exact, receipt.read_fraction) == ("bit", 1.0)


@pytest.mark.parametrize("method", WHOLE)
def test_a_session_goes_on_as_the_plain_model_does(real: Any, method: str, tmp_path: Path) -> None:
    model, tokenizer = real
    ids = batch_of(tokenizer, 600)["input_ids"]
    text, steps = ids[:, :592], ids[:, 592:].split(1, 1)
    cache: Any = plain_cache(model)
    forward(model, text, cache)
    plain = torch.cat([forward(model, step, cache) for step in steps], 1)
    with farkv.attach(model, WHOLE[method]) as far:
        saved = far.new_cache()
        forward(model, text, saved)
        saved.save(tmp_path / "text.farkv", tokenizer=tokenizer)
        for _ in range(2):
            cache = farkv.load_cache(tmp_path / "text.farkv", model, tokenizer=tokenizer)
            assert torch.equal(torch.cat([forward(model, step, cache) for step in steps], 1), plain)


def test_a_chat_prompt_is_answered_as_by_the_plain_model(real: Any) -> None:
    model, tokenizer = real
    text = draw_text(tokenizer, 300, 2)
    message = [{"role": "user", "content": f"{text}\n{QUESTION}"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    prompt = ask_of(tokenizer, 300, 2, QUESTION)
    assert prompt.text + prompt.question == ids[0].tolist()
    with farkv.attach(model, Full()) as far:
        cache = far.new_cache(tokens=prompt.n_tokens + 24)
        answer = ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(24))
    # The question goes through token by token: sums of other lengths, so equal in words, not in bits.
    assert answer == expected
    assert answer.strip()


# --- at 0.05, what the full cache answers -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_fact_is_found_at_one_in_twenty(real: Any, seed: int) -> None:
    model, tokenizer = real
    draw = random.Random(seed)
    code = str(draw.randrange(10**6, 10**7))
    fact = f"The access code of the harbour is {code}."
    question = "What is the access code of the harbour? Answer with the number."
    prompt = ask_of(tokenizer, 1800, seed, question, fact, at=draw.uniform(0.1, 0.9))
    answers, reads = {}, {}
    for method in (Full(), InfiniGen(fraction=0.05)):
        with farkv.attach(model, method) as far:
            cache = far.new_cache(tokens=prompt.n_tokens + 16)
            name = far.receipt(cache).method
            answers[name] = ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(16))
            reads[name] = far.receipt(cache).read_fraction
    assert reads["full"] == 1.0
    assert 0 < reads["infinigen"] <= 0.05
    assert code in answers["full"], "the model itself does not find it"
    assert code in answers["infinigen"]


# --- limits -----------------------------------------------------------------------------------------------------

STORAGE: dict[str, dict[str, str]] = {
    "near": {"near": "16MiB"},
    "near and host": {"near": "16MiB", "host": "80MiB"},
    "disk": {"disk": "100MiB", "host": "24MiB"},
    "disk and near": {"disk": "100MiB", "host": "24MiB", "near": "16MiB"},
    "int4 on disk": {"disk": "20MiB", "host": "16MiB", "quant": "int4"},
}


@pytest.mark.parametrize("storage", STORAGE)
def test_limits_hold(real: Any, storage: str, tmp_path: Path) -> None:
    model, tokenizer = real
    limits = dict(STORAGE[storage])
    sizes = {name: parse_bytes(limits.get(name), name) for name in ("near", "host", "disk")}
    if "disk" in limits:
        limits["disk"] = f"{tmp_path}:{limits['disk']}"
    prompt = ask_of(tokenizer, 1000, 5, QUESTION)
    with farkv.attach(model, InfiniGen(fraction=0.1), **limits) as far:
        cache = far.new_cache(tokens=prompt.n_tokens + 8)
        ask(far, tokenizer, prompt, cache=cache, decoding=Decoding(8))
        receipt = far.receipt(cache)
    peaks = {name: getattr(receipt.kv_bytes, f"{name}_peak") for name in sizes}
    assert all(peaks[name] <= limit for name, limit in sizes.items() if limit is not None), peaks
    # What the limits are of would not fit into them.
    assert receipt.kv_bytes.total > max(sizes["near"] or 0, sizes["host"] or 0 if "disk" in limits else 0)
    assert receipt.read_fraction <= 0.1
    assert (peaks["disk"] > 0) == ("disk" in limits)


def test_what_cannot_fit_is_refused_before_the_prompt(real: Any) -> None:
    model, _ = real
    with farkv.attach(model, InfiniGen(fraction=0.1), host="24MiB") as far, pytest.raises(CapacityError, match="host"):
        far.new_cache(tokens=2000)


# --- the GGUF file ----------------------------------------------------------------------------------------------


def test_the_file_is_the_model_of_the_folder(real: Any, folder: Path) -> None:
    path = folder / "model.gguf"
    if not path.is_file():
        pytest.skip(f"the model at {folder} is of the hub: it has no model.gguf")
    model, tokenizer = load_model(str(path), device="cpu")
    assert identify_model(model) == identify_model(real[0])
    assert digest_weights(model) == digest_weights(real[0])
    text = draw_text(tokenizer, 200, 3) + "\tdef f(x):  # é 12345 <|im_end|>"
    assert tokenizer(text)["input_ids"] == real[1](text)["input_ids"]
    assert tokenizer.chat_template == real[1].chat_template


def test_the_command_says_what_was_dequantised(real: Any, folder: Path, tmp_path: Path) -> None:
    path = folder / "model.gguf"
    if not path.is_file():
        pytest.skip(f"the model at {folder} is of the hub: it has no model.gguf")
    text = tmp_path / "text.txt"
    text.write_text(draw_text(real[1], 400, 6))
    done = command("run", "--model", str(path), "--file", str(text), "--json", "--max-new-tokens", "8", QUESTION)
    assert done.returncode == 0, done.stderr
    weights = json.loads(done.stdout)["weights"]
    assert weights == {"dtype": "float32", "source": "Q4_1, Q8_0, F32 of model.gguf, dequantised by transformers"}
    assert "model.gguf: Q4_1, Q8_0, F32 weights, dequantised by transformers into float32" in done.stderr
