"""A real model: SmolLM2-135M-Instruct in float32, where `make test-real` has put it; without it these tests skip."""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from farkv.hf.load import load_model
from farkv.hf.prompt import Prompt, build_prompt

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAME = "smollm2"


@pytest.fixture(scope="session")
def folder() -> Path:
    """Return the model's folder."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks, which fetch the model, are not part of a source distribution")
    sys.path.insert(0, str(BENCHMARKS))
    from real_models import find_folder, is_there  # pyright: ignore[reportMissingImports]

    found = find_folder() / NAME
    if not is_there(found):
        pytest.skip(f"no real model at {found}: make test-real, or python benchmarks/real_models.py {NAME}")
    return found


@pytest.fixture(scope="session")
def real(folder: Path) -> Any:
    """Return model and tokenizer."""
    return load_model(str(folder), dtype="float32", device="cpu")


def draw_text(tokenizer: Any, tokens: int, seed: int) -> str:
    """Return so many tokens of English about Python, another part of it for every seed."""
    words = "\n\n".join(topics[name].strip() for name in sorted(topics))
    start = 40_000 * seed
    # Some four characters make a token of it.
    ids = tokenizer(words[start : start + 8 * tokens], add_special_tokens=False)["input_ids"]
    assert len(ids) >= tokens
    return tokenizer.decode(ids[:tokens])


def ask_of(tokenizer: Any, tokens: int, seed: int, question: str, fact: str = "", at: float = 0.5) -> Prompt:
    """Return a question about a text as the chat template puts it; `fact` stands in the text as a line of its own."""
    lines = draw_text(tokenizer, tokens, seed).splitlines(keepends=True)
    place = round(at * len(lines))
    return build_prompt(tokenizer, "".join([*lines[:place], f"{fact}\n" if fact else "", *lines[place:]]), question)
