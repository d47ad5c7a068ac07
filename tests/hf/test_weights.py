"""Packed weights: the products are those of the weights that are packed, and nothing takes such a model for another."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from typer.testing import CliRunner

import farkv
from farkv.cli.commands import app
from farkv.errors import ConfigError, FarKVError
from farkv.hf.identity import digest_weights, identify_model
from farkv.hf.load import load_model
from farkv.hf.load_gguf import count_bytes
from farkv.hf.packed import BLOCK_ROWS, GROUP, Int4Linear, Int8Linear, PackedLinear, PortableInt8Linear
from farkv.hf.weights import find_form, pack_weights
from farkv.methods import Full, InfiniGen

SIZES = ((64, 48), (96, 4112))
# What large maps are packed into.
INT8: type[PackedLinear] = Int8Linear if Int8Linear.is_possible() else PortableInt8Linear
KINDS: list[type[PackedLinear]] = [PortableInt8Linear, Int4Linear, *([Int8Linear] if INT8 is Int8Linear else [])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_weights_are_rounded_to_the_nearest_code(kind: type[PackedLinear], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    source = nn.Linear(*size)
    source.weight.data[3] = 0
    weight = source.weight.detach().double()
    got = kind(source).unpack().double()
    if kind is not Int4Linear:
        step = weight.abs().amax(1, keepdim=True) / 127
        assert ((got - weight).abs() <= 0.51 * step + 1e-12).all()
        return
    groups = weight.view(size[1], -1, GROUP)
    step = ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(GROUP, 1)
    # Scale and zero are of 8 bits, and the zero stands for eight steps; the kernel's sum is rounded once more.
    room = 2**-8 * (16 * step + weight.abs())
    assert ((got - weight).abs() <= 0.51 * step + room + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, BLOCK_ROWS])
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_packed_weights(
    kind: type[PackedLinear], dtype: torch.dtype, rows: int, has_bias: bool
) -> None:
    torch.manual_seed(rows)
    source = nn.Linear(96, 4112, bias=has_bias).to(dtype)
    packed = kind(source)
    x = torch.randn(2, rows, 96).to(dtype) if rows > 1 else torch.randn(96).to(dtype)
    bias = None if source.bias is None else source.bias.detach().double()
    weight = packed.unpack().double()
    want = linear(x.double(), weight, bias)
    got = packed(x)
    assert got.shape == want.shape
    assert got.dtype is dtype
    # Inputs and the result are rounded to bfloat16; sums are in float32.
    room = 2**-8 * (linear(x.double().abs(), weight.abs()) + want.abs()) + 1e-6
    if kind is Int8Linear:
        # Inputs to 2^-14 of the largest; of bfloat16, the result as well.
        most = x.double().abs().amax(-1, keepdim=True)
        room = 2**-13.9 * most * weight.abs().sum(1) + (2**-8 if dtype is torch.bfloat16 else 1e-6) * want.abs() + 1e-6
    assert ((got.double() - want).abs() <= room).all()


def test_many_rows_are_not_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    packed, x = PortableInt8Linear(nn.Linear(96, 4112)), torch.randn(64, 96)
    assert packed.bias is not None
    want = linear(x.double(), packed.unpack().double(), packed.bias.detach().double())
    assert (packed(x) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.skipif(not Int8Linear.is_possible(), reason="torch has no FBGEMM here")
def test_a_row_of_eight_bits_depends_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packed, x = Int8Linear(nn.Linear(96, 48)), torch.randn(600, 96)
    x[7] *= 1e6
    x[9] = float("nan")
    x[11, 3] = float("inf")
    together = packed(x)
    assert together.isfinite().any(1).logical_not().nonzero().flatten().tolist() == [9, 11]
    for i in (0, 7, 599):
        torch.testing.assert_close(packed(x[i : i + 1])[0], together[i], rtol=1e-6, atol=0)
    monkeypatch.setenv("FARKV_KERNEL", "plain")
    torch.testing.assert_close(
        packed(x), together, rtol=1e-4, atol=1e-4 * float(together[0].abs().max()), equal_nan=True
    )


def test_large_maps_are_multiplied_by_fbgemm() -> None:
    for inputs, outputs, form in ((512, 2048, INT8), (512, 2047, PortableInt8Linear)):
        assert find_form("int8", nn.Linear(inputs, outputs, device="meta")) is form


def test_weights_whose_products_would_overflow_do_not() -> None:
    # Every code 127 or -127, every input the largest: sums of two products of 8 bits are as large as they can be.
    source = nn.Linear(64, 16, bias=False)
    source.weight.data = torch.ones(16, 64) * torch.tensor([1.0, -1.0])[torch.arange(16) % 2][:, None]
    packed, x = INT8(source), torch.ones(2, 64) * torch.tensor([[1.0], [-3.0]])
    torch.testing.assert_close(packed(x), linear(x, packed.unpack()), rtol=1e-4, atol=0)


def load_demo() -> Any:
    return load_model("demo", dtype="float32", device="cpu")[0]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_every_linear_map_is_packed_and_bytes_say_so(kind: str) -> None:
    model = load_demo()
    before, linears = count_bytes(model), [m for m in model.modules() if type(m) is nn.Linear]
    packed = pack_weights(model, kind)
    assert packed is model
    left = [m for m in model.modules() if type(m) is nn.Linear]
    made = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(left) + len(made) == len(linears)
    assert kind != "int8" or not left
    assert all(m.in_features % 32 or m.out_features % 16 for m in left)
    assert model.farkv_source == f"{kind} of {len(made)} of {len(linears)} linear maps"
    saved = sum(m.in_features * m.out_features for m in made) * (3 if kind == "int8" else 3.375)
    # The head shares the embedding, which stays.
    tied = model.lm_head.in_features * model.lm_head.out_features * 4 if model.config.tie_word_embeddings else 0
    assert before - count_bytes(model) >= 0.9 * saved - tied


def test_plain_weights_go_one_map_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = load_demo(), list[int]()
    plain = [weakref.ref(m) for m in model.modules() if type(m) is nn.Linear]
    form = PortableInt8Linear
    make = form.__init__

    def count(self: PackedLinear, source: nn.Linear) -> None:
        alive.append(sum(ref() is not None for ref in plain))
        make(self, source)

    monkeypatch.setattr(form, "__init__", count)
    pack_weights(model, "int8")
    # The last one that was replaced may still be in a local name.
    assert all(n <= len(plain) - i + 1 for i, n in enumerate(alive))
    assert not [ref for ref in plain if ref() is not None]


def test_a_copy_of_a_packed_model_is_one() -> None:
    model, ids = pack_weights(load_demo(), "int8"), torch.arange(5, 25)[None]
    other = copy.deepcopy(model)
    assert digest_weights(other) == digest_weights(model)
    assert count_bytes(other) == count_bytes(model)
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_gradient_is_refused_and_not_lost() -> None:
    model = pack_weights(load_demo(), "int8")
    assert not any(weight.requires_grad for weight in model.parameters())
    # Without no_grad: what asks for no gradient runs.
    assert model(input_ids=torch.arange(5, 9)[None]).logits.isfinite().all()
    packed, x = INT8(nn.Linear(96, 48)), torch.randn(2, 96, requires_grad=True)
    with pytest.raises((ConfigError, RuntimeError)):
        packed(x).sum().backward()
    assert x.grad is None
    with torch.no_grad():
        packed(x)


def test_maps_that_are_shared_stay_shared() -> None:
    model = load_demo()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj = first.up_proj
    pack_weights(model, "int8")
    assert isinstance(first.up_proj, PackedLinear)
    assert second.up_proj is first.up_proj


def test_what_cannot_be_packed_is_refused() -> None:
    model = load_demo()
    with pytest.raises(ConfigError, match="weights: expected none, int8 or int4, got 'int3'"):
        pack_weights(model, "int3")
    assert pack_weights(model, "none") is model
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    pack_weights(model, "int8")
    with pytest.raises(ConfigError, match="packed already"):
        pack_weights(model, "int4")
    with pytest.raises(ConfigError, match="int8 is for a CPU"):
        pack_weights(load_demo().to("meta"), "int8")
    other = load_demo()
    other.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="quantised by gptq"):
        pack_weights(other, "int8")


def test_a_packed_model_is_known_as_what_it_was_and_not_taken_for_it(tmp_path: Path) -> None:
    plain, text = load_demo(), torch.arange(5, 45)[None]
    packed = pack_weights(copy.deepcopy(plain), "int8")
    assert identify_model(packed) == identify_model(plain), "a profile of the one serves the other"
    assert digest_weights(packed) != digest_weights(plain)
    with farkv.attach(packed, Full()) as far, torch.no_grad():
        cache = far.new_cache()
        packed(input_ids=text, past_key_values=cache)
        cache.save(tmp_path / "text.farkv")
    with farkv.attach(plain, Full()), pytest.raises(FarKVError, match="model"):
        farkv.load_cache(tmp_path / "text.farkv", plain)
    with farkv.attach(packed, Full()):
        assert farkv.load_cache(tmp_path / "text.farkv", packed).get_seq_length() == 40


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_reading_everything_is_the_packed_model_itself(kind: str) -> None:
    model = pack_weights(load_demo(), kind)
    ids = torch.randint(0, 100, (1, 60), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **options)
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        cache = far.new_cache()
        got = model.generate(ids, past_key_values=cache, **options)
        assert far.receipt(cache).weights.source is not None
    assert torch.equal(got.sequences, want.sequences)
    for one, other in zip(got.logits, want.logits, strict=True):
        assert torch.equal(one, other)


def test_the_command_packs_and_says_so() -> None:
    asked = ["run", "-m", "demo", "--weights", "int8", "--device", "cpu", "--max-new-tokens", "2", "--json", "x = 1"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    receipt = json.loads(done.stdout)
    assert receipt["weights"]["source"].startswith("int8 of ")
    refused = CliRunner().invoke(app, ["run", "-m", "demo", "--weights", "int7", "x = 1"])
    assert isinstance(refused.exception, ConfigError)
    assert "weights: expected none, int8 or int4, got 'int7'" in str(refused.exception)
