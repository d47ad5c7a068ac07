"""How much of a model is loaded is told while it is, of a folder and of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import modeling_gguf_pytorch_utils

from farkv.demo import MODEL_PATH
from farkv.errors import InputError
from farkv.hf.load import load_model
from farkv.hf.load_bytes import count_bytes, telling_bytes


def test_bytes_are_told_from_none_to_all() -> None:
    told: list[tuple[int, int | None]] = []
    load_model("demo", device="cpu", on_load=lambda *now: told.append(now))
    total = (Path(MODEL_PATH) / "model.safetensors").stat().st_size
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert len(told) > 20
    assert told == sorted(told, key=lambda now: now[0])


def test_of_what_is_not_here_the_number_is_not_known(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    with telling_bytes("owner/name", lambda *now: told.append(now)):
        pass
    assert told == [(0, None)]
    for name, size in {
        "model-00001-of-2.safetensors": 3,
        "model-00002-of-2.safetensors": 4,
        "profile.safetensors": 9,
    }.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert count_bytes(tmp_path) == 7
    assert count_bytes(tmp_path / "profile.safetensors") == 9


def test_the_bars_of_transformers_are_put_back_also_after_an_error() -> None:
    before = modeling_gguf_pytorch_utils.tqdm
    with pytest.raises(InputError):
        load_model("/no/such/folder", on_load=lambda *now: None)
    with pytest.raises(RuntimeError), telling_bytes("x", lambda *now: None):
        raise RuntimeError
    assert modeling_gguf_pytorch_utils.tqdm is before
    assert transformers.utils.logging.set_tqdm_hook(None) is None
