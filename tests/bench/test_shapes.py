"""Shapes: their bytes, names and contexts."""

from __future__ import annotations

import pytest

from farkv.bench.shapes import SHAPES, find_shape, format_tokens, parse_contexts
from farkv.errors import ConfigError


def test_a_layer_of_llama3_8b_at_128k_is_half_a_gibibyte() -> None:
    shape = find_shape("llama3-8b")
    assert shape.record_bytes() == 512
    assert shape.layer_bytes(128 * 1024) == 512 << 20
    assert shape.layer_bytes(1024, batch=3, itemsize=4) == 3 * 8 * 1024 * 1024


@pytest.mark.parametrize("name", SHAPES)
def test_heads_of_every_shape_fill_its_hidden_size(name: str) -> None:
    shape = find_shape(name)
    assert shape.heads * shape.head_dim == shape.hidden
    assert shape.heads % shape.kv_heads == 0


def test_contexts_are_read_with_and_without_a_letter_in_ascending_order() -> None:
    assert parse_contexts("32K, 8192,8k,100") == [100, 8192, 32768]
    assert [format_tokens(n) for n in (8192, 100)] == ["8 K", "100"]


@pytest.mark.parametrize("text", ["", "8M", "-8K", "63", "8K,,"])
def test_a_context_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--contexts"):
        parse_contexts(text)


def test_an_unknown_shape_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"llama3-8b.*got 'gpt'"):
        find_shape("gpt")
