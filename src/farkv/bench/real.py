"""A real model instead of a shape: its own weights, or the shape of its layers alone.

In: a name as `farkv run` takes it. Out: a `ModelShape`, with the model where all of it is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from farkv.bench.shapes import ModelShape
from farkv.errors import ConfigError
from farkv.hf.load import load_config, load_model


def read_shape(name: str) -> ModelShape:
    """Return the shape of a real model's layers, from its configuration.

    Raises:
        InputError: there is no such model.
        ConfigError: its configuration does not say it.
    """
    return describe_shape(load_config(name), name)


def load_real(name: str, dtype: str, weights: str = "none") -> tuple[PreTrainedModel, ModelShape]:
    """Return a real model on the CPU, which is what is measured, and its shape. Raises as `read_shape`."""
    model, _ = load_model(name, dtype=dtype, device="cpu", weights=weights)
    return model, describe_shape(model.config, name)


def describe_shape(config: Any, name: str) -> ModelShape:
    """Return the shape that a configuration describes."""
    text = config.get_text_config(decoder=True)

    def find(*names: str) -> int:
        value = next((found for n in names if (found := getattr(text, n, None)) is not None), None)
        if not isinstance(value, int):
            raise ConfigError(f"--model: the configuration of {name} has no number {names[0]}; use --shape")
        return value

    heads, hidden = find("num_attention_heads"), find("hidden_size")
    return ModelShape(
        name=Path(name).name,
        family=None,
        layers=find("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        mlp=find("intermediate_size", "ffn_dim", "hidden_size"),
    )
