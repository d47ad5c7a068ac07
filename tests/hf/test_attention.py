"""The attention function that an engine is handed: what stands in for it gives what the model's own attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError
from farkv.hf._compat import find_attention
from farkv.hf.attention import OwnAttention
from farkv.math.logits import Logits
from farkv.math.step import AttentionFunction
from farkv.math.stream import Stream
from farkv.methods import Full
from tests.models import make_model

B, HQ, HKV, T, S, D = 2, 4, 2, 5, 13, 8


def options_of(family: str, module: Any) -> dict[str, Any]:
    """What each model file hands to its attention besides queries, keys, values and mask."""
    options = {"scaling": module.scaling, "dropout": 0.0}
    if family == "gemma2":
        options["softcap"] = module.attn_logit_softcapping
    if family == "gpt_oss":
        options["s_aux"] = module.sinks
    return options


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_a_stream_stands_in_for_the_models_own_attention(family: str, implementation: str | None) -> None:
    model = make_model(family, implementation=implementation)
    q, k, v = torch.randn(B, T, HQ, D).transpose(1, 2), torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, D)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None].repeat(B, 1, 1, 1)
    mask[0, ..., :6] = False
    with farkv.attach(model, Full()):
        module = find_attention(model)[0]
        options = options_of(family, module)
        attention = OwnAttention(module, options)
        assert isinstance(attention, AttentionFunction)
        eager = module.farkv_base == "eager"
        softcap = options.get("softcap") if eager else None
        assert (attention.sinks is not None) == (family == "gpt_oss")
        if not eager:
            options.pop("softcap", None)
        expected = attention(q, k, v, mask)
        stream = Stream(q, Logits(module.scaling, softcap, attention.sinks))
        for a, b in ((0, 4), (4, S - T)):
            stream.add(k[:, :, a:b], v[:, :, a:b], mask[..., a:b])
        stream.add(k[:, :, S - T :], v[:, :, S - T :], None, causal=True)
        got = attention.wrap(stream.finish())
    assert isinstance(expected, tuple)
    assert got[0].shape == expected[0].shape
    assert got[0].is_contiguous()
    # float32: 24 bits of D products and S exponentials.
    assert torch.allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)


def test_sinks_that_differ_between_queries_are_refused() -> None:
    model = make_model("gpt_oss")
    with farkv.attach(model, Full()):
        module = find_attention(model)[0]
        attention = OwnAttention(module, {"sinks": torch.zeros(B, HQ, T, 1)})
        with pytest.raises(CacheStateError, match="sinks"):
            _ = attention.sinks
