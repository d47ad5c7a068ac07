"""A GGUF file as a model: its weights are those of the file, and what cannot be loaded is refused in one sentence."""

from __future__ import annotations

import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import farkv
from farkv.errors import InputError, ProfileError
from farkv.hf.identity import identify_model, identify_tokenizer
from farkv.hf.load import load_config, load_model
from farkv.methods import Full
from tests.gguf_files import KV_HEADS, LAYERS, TEMPLATE, write_gguf
from tests.models import assert_same, generate

IDS = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(1))
PROMPT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def write(path: Path, **options: Any) -> Path:
    write_gguf(path, **options)
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "F32"])
def test_the_weights_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tiny.gguf"
    held = write_gguf(path, kind=kind)
    model, tokenizer = load_model(str(path), device="cpu")
    assert model.dtype == torch.float32
    weights = dict(model.named_parameters())
    for name, ours in (("blk.1.ffn_down", "layers.1.mlp.down_proj"), ("blk.2.attn_v", "layers.2.self_attn.v_proj")):
        assert np.array_equal(weights[f"model.{ours}.weight"].numpy(), held[f"{name}.weight"])
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|end|>")
    assert tokenizer.decode(tokenizer("the än <|end|>\n")["input_ids"]) == "the än <|end|>\n"
    assert load_config(str(path)).num_key_value_heads == KV_HEADS


def test_a_file_need_not_name_every_special_token(tmp_path: Path) -> None:
    _, tokenizer = load_model(str(write(tmp_path / "tiny.gguf", leave_out="pad")), device="cpu")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", None)


def test_attached_it_answers_as_it_does_alone_and_the_receipt_names_its_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    model, _ = load_model(str(path), device="cpu")
    plain = generate(model, PROMPT, None, n=6)
    with farkv.attach(model, Full()) as far:
        assert_same(generate(model, PROMPT, far.new_cache(), n=6), plain)
        receipt = far.receipt()
    assert receipt.model == str(path)
    assert (receipt.weights.dtype, receipt.weights.source) == (
        "float32",
        "Q8_0, F32 of tiny.gguf, dequantised by transformers",
    )
    assert receipt.exact == "bit"


def test_it_is_an_ordinary_model_afterwards(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(str(path), device="cpu")
    identity, words = identify_model(model), identify_tokenizer(tokenizer)
    for loaded in (model, tokenizer):
        loaded.save_pretrained(tmp_path / "folder")
    again, same = load_model(str(tmp_path / "folder"), device="cpu")
    assert identify_model(again) == identity
    assert identify_tokenizer(same) == words
    assert identify_model(load_model(str(path), dtype="bfloat16", device="cpu")[0]) == identity
    assert model.float().half().dtype == torch.float16


def test_what_lies_beside_the_file_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_text('{"model_type": "opt", "eos_token": null, "chat_template": "none"}')
    model, tokenizer = load_model(str(path), device="cpu")
    assert (model.config.model_type, tokenizer.chat_template, tokenizer.eos_token) == ("llama", TEMPLATE, "<|end|>")


@pytest.mark.parametrize("name", ["a [b] {c}.gguf", "ä\n.GGUF", "no suffix", "-m.gguf", "~.gguf"])
def test_any_name_that_a_file_can_have(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny.gguf").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "to.gguf").symlink_to(name)
    for given in (name, f"./{name}", str(tmp_path / name), "to.gguf"):
        model, _ = load_model(given, device="cpu")
        assert len(list(model.modules())) > LAYERS


def test_a_line_says_what_became_of_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with caplog.at_level(logging.WARNING, "farkv"):
        load_model(str(path), device="cpu")
    said, rotation = caplog.messages
    assert said.startswith("tiny.gguf: Q8_0, F32 weights, dequantised by transformers into float32: 180.9 KiB in")
    assert "--dtype" in said
    assert "does not read rope_freqs.weight" in rotation


# --- profiles ---------------------------------------------------------------------------------------------------


def test_the_profile_beside_a_file_is_the_files_own(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    model, _ = load_model(str(path), device="cpu")
    measured = farkv.profile(model, [IDS[0]])
    (tmp_path / "profile.safetensors").write_bytes(b"of another model in this folder")
    with farkv.attach(model) as far:
        assert far.setting.profile is None
    measured.save(tmp_path / "tiny.profile.safetensors")
    with farkv.attach(model) as far:
        assert far.setting.profile is not None
    other, _ = load_model(str(write(tmp_path / "tiny.gguf", kind="Q4_0")), device="cpu")
    with pytest.raises(ProfileError, match=r"weights is .*create one for this model"):
        farkv.attach(other)


# --- what cannot be loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "rwkv9"}, "architecture 'rwkv9'.*not supported"),
        ({"leave_out": "blk.1.ffn_down.weight"}, r"lacks 1 of the weights.*layers\.1\.mlp\.down_proj"),
        ({"leave_out": "token_embd.weight"}, "lacks"),
        ({"extra": {"split.count": 3}}, "one of 3 parts; join"),
        ({"words": False}, "tokenizer"),
    ],
)
def test_a_whole_file_that_is_no_usable_model(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "tiny.gguf", **options)
    with pytest.raises(InputError, match=f"^model .*tiny.gguf: .*{says}.*; expected") as raised:
        load_model(str(path), device="cpu")
    assert "\n" not in str(raised.value)


def test_no_part_of_a_file_is_taken_for_the_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    for n in (0, 3, 4, 20, 24, 500, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"no GGUF file|it is cut"):
            load_model(str(path), device="cpu")


def test_a_damaged_file_is_refused_in_one_sentence_or_loaded(tmp_path: Path) -> None:
    whole, path = write(tmp_path / "tiny.gguf").read_bytes(), tmp_path / "bad.gguf"
    refused = 0
    for seed in range(30):
        draw, data = random.Random(seed), bytearray(whole)
        for _ in range(3):
            data[draw.randrange(4, 9000)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            load_model(str(path), device="cpu")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 10


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "text").write_text("words")
    (tmp_path / "no-model").mkdir()
    write(tmp_path / "no-model" / "b c.gguf")
    for name, says in (
        ("none.gguf", "No such file"),
        ("folder.gguf", "config.json, found none"),
        ("pipe.gguf", "is a pipe, expected a file"),
        ("text", "begins with b'word'.*no GGUF file"),
        ("no-model", "it has 'b c.gguf': give that file"),
        ("a\0b.gguf", "a NUL stands in it"),
    ):
        with pytest.raises(InputError, match=f"^model .*{says}"):
            load_model(f"{tmp_path}/{name}", device="cpu")
    (tmp_path / "text").chmod(0)
    if os.geteuid():
        with pytest.raises(InputError, match="Permission denied"):
            load_model(f"{tmp_path}/text", device="cpu")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "tiny.gguf")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs the packages gguf and accelerate \(.*{package}.*farkv\[gguf\]"):
        load_model(str(path), device="cpu")
