"""At 100 % over a disk, a session or a link: the plain model's bits where a layer fits; the receipt says which."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farkv
from farkv.errors import SessionError
from farkv.hf.handle import Handle
from farkv.kernels.native import load_native
from farkv.methods import H2O, XKV, Full, InfiniGen, LowBit, Method, Pages
from farkv.session.file import Saved, write_saved
from tests.models import forward, generate, make_model, make_prompt, plain_cache

TOKENS, NEW = 300, 5
WHOLE: dict[str, Method] = {"full": Full(), "ours": InfiniGen(fraction=1.0), "pages": Pages(fraction=1.0, page=8)}
PLACES: dict[str, dict[str, Any]] = {
    "disk": {"disk": "1GiB"},
    "disk, host": {"disk": "1GiB", "host": "2MiB"},
    "disk, near": {"disk": "1GiB", "near": "400KiB"},
    "near": {"near": "300KiB"},
    "plain kernel": {"kernel": "plain"},
}
# Bytes of one layer of the tiny model in float32, all of the context.
LAYER = (TOKENS + NEW) * 2 * 16 * 4
# How much further from double precision than the plain model a run may be that is equal to rounding.
MORE = 8


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return make_model("llama", max_position_embeddings=1024, dtype=dtype, **changes).to(dtype)


def text_of(chunk: int, batch: int = 1) -> list[Tensor]:
    """Return a text in passes, and the tokens that follow one by one."""
    ids = make_prompt(batch, tokens=TOKENS + NEW)["input_ids"]
    return [*ids[:, :TOKENS].split(chunk, 1), *ids[:, TOKENS:].split(1, 1)]


def read(model: Any, parts: list[Tensor], cache: Any) -> Tensor:
    return torch.cat([forward(model, part, cache) for part in parts], 1)


def attach(model: Any, method: Method, folder: Path, **limits: Any) -> Handle:
    if "disk" in limits:
        limits["disk"] = f"{folder}:{limits['disk']}"
    return farkv.attach(model, method, **limits)


@pytest.mark.parametrize("chunk", [7, 64, 100, TOKENS])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_is_read_as_the_plain_model_reads_it(
    dtype: torch.dtype, method: str, place: str, chunk: int, tmp_path: Path
) -> None:
    model, parts = make(dtype), text_of(chunk, batch=2)
    plain = read(model, parts, plain_cache(model))
    with attach(model, WHOLE[method], tmp_path, **PLACES[place]) as far:
        assert torch.equal(read(model, parts, far.new_cache()), plain)
        receipt = far.receipt()
    assert receipt.exact == "bit"
    assert receipt.read_fraction == 1.0


@pytest.mark.parametrize("place", ["disk", "near"])
def test_a_prompt_that_is_announced_and_read_in_chunks_too(place: str, tmp_path: Path) -> None:
    model, prompt = make(torch.bfloat16), make_prompt(1, tokens=TOKENS)
    for chunk in (33, 128):
        plain = generate(model, prompt, n=12, prefill_chunk_size=chunk)
        with attach(model, Full(), tmp_path, **PLACES[place]) as far:
            cache = far.new_cache(tokens=TOKENS + 12, chunk_tokens=chunk)
            ours = generate(model, prompt, cache, n=12, prefill_chunk_size=chunk)
        assert torch.equal(ours.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_by", ["memory", "disk"])
def test_a_session_goes_on_as_the_plain_model_does(saved_by: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, parts, limits = make(dtype), text_of(64), PLACES["disk"] if saved_by == "disk" else {}
    plain = read(model, parts, plain_cache(model))
    for name, method in WHOLE.items():
        with attach(model, method, tmp_path, **limits) as far:
            cache = far.new_cache()
            read(model, parts[:-NEW], cache)
            cache.save(tmp_path / name)
        for then in (method, Full()):
            with farkv.attach(model, then) as far:
                ours = read(model, parts[-NEW:], farkv.load_cache(tmp_path / name, model))
                assert torch.equal(ours, plain[:, -NEW:])
                assert far.receipt().exact == "bit"


@pytest.mark.parametrize(
    "limits", [{"near": 3 * LAYER // 4}, {"near": 3 * LAYER // 4, "disk": "1GiB"}], ids=["link", "disk"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_is_equal_to_rounding_and_says_so(
    dtype: torch.dtype, limits: dict[str, Any], tmp_path: Path
) -> None:
    model, parts = make(dtype), text_of(64)
    plain = read(model, parts, plain_cache(model)).double()
    exact = copy.deepcopy(model).double()
    truth = read(exact, parts, plain_cache(exact))
    share = dtype.itemsize / 4
    with attach(model, Full(), tmp_path, **limits | {"near": int(limits["near"] * share)}) as far:
        cache = far.new_cache()
        ours = read(model, parts, cache).double()
        assert cache.engine.store.streams
        assert far.receipt().exact == "rounding"
    assert (ours - truth).abs().max() <= MORE * (plain - truth).abs().max()


def test_a_cache_that_outgrows_its_limit_says_so_from_then_on(tmp_path: Path) -> None:
    model, parts = make(), text_of(50)
    with attach(model, Full(), tmp_path, disk="1GiB", near=3 * LAYER // 4) as far:
        cache, said = far.new_cache(), []
        for part in parts:
            forward(model, part, cache)
            said.append(far.receipt().exact)
        cache.crop(-TOKENS)
        forward(model, parts[0], cache)
        said.append(far.receipt().exact)
    assert said == sorted(said)
    assert (said[0], said[-1]) == ("bit", "rounding")


def say(method: Method, tokens: int = 60, **options: Any) -> str:
    model = make()
    with farkv.attach(model, method, **options) as far:
        generate(model, make_prompt(2, tokens=tokens, pad=9), far.new_cache(), n=4)
        return far.receipt().exact


def test_what_is_left_out_or_coded_says_no() -> None:
    assert say(InfiniGen(fraction=0.3)) == "no"
    assert say(XKV(fraction=0.3)) == "no"
    assert say(H2O(fraction=0.3)) == "no"
    assert say(Full(), quant="int8") == "no"
    assert say(Full(), host=90_000, evict="lru") == "no"
    assert say(LowBit(fraction=1.0), near="1MiB") == "bit"
    assert say(XKV(fraction=1.0), near="1MiB") == "bit"


def test_a_prompt_that_was_evicted_or_coded_says_no_before_the_next_pass() -> None:
    model, prompt = make(), make_prompt(1, tokens=60)["input_ids"]
    for method, options in ((XKV(fraction=0.3), {}), (Full(), {"quant": "int4"})):
        with farkv.attach(model, method, **options) as far:
            forward(model, prompt, far.new_cache())
            assert far.receipt().exact == "no"


@pytest.mark.skipif(load_native() is None, reason="there are no kernels here")
def test_a_kernel_that_reads_everything_says_rounding() -> None:
    model, prompt = make(), make_prompt(1, tokens=60)
    for method, kernel, says in (
        (Full(), "native", "rounding"),
        (InfiniGen(fraction=1.0), "native", "rounding"),
        # Below the crossover a choice would be all of it.
        (InfiniGen(), "auto", "rounding"),
        (InfiniGen(), "plain", "bit"),
        (InfiniGen(fraction=1.0), "auto", "bit"),
    ):
        with farkv.attach(model, method, kernel=kernel) as far:
            generate(model, prompt, far.new_cache(), n=4)
            assert far.receipt().exact == says, (method, kernel)


def test_copies_and_joined_batches_remember(tmp_path: Path) -> None:
    model, ids = make(), make_prompt(1, tokens=40)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=0.2)) as far:
        one, other = far.new_cache(), far.new_cache()
        for cache in (one, other):
            forward(model, ids, cache)
        forward(model, ids[:, :1], one)
        assert far.receipt(copy.deepcopy(one)).exact == "no"
        other.join(one)
        assert far.receipt(other).exact == "no"
    with farkv.attach(model, Full()) as far:
        one, other = far.new_cache(), far.new_cache()
        for cache in (one, other):
            forward(model, ids, cache)
        one.join(other)
        assert far.receipt(one).exact == "rounding"


def test_verified_steps_are_the_runs_own() -> None:
    model, prompt = make(), make_prompt(1, tokens=60)
    with farkv.attach(model, Full()) as far:
        generate(model, prompt, far.new_cache(verify=2), n=4)
        assert far.receipt().exact == "bit"


def test_a_session_remembers_how_it_was_read(tmp_path: Path) -> None:
    model, ids, path = make(), make_prompt(1, tokens=60)["input_ids"], tmp_path / "a"
    with farkv.attach(model, InfiniGen(fraction=0.2)) as far:
        cache = far.new_cache()
        for part in (ids, ids[:, :1]):
            forward(model, part, cache)
        cache.save(path)
    with farkv.attach(model, Full()) as far:
        forward(model, ids[:, :1], farkv.load_cache(path, model))
        assert far.receipt().exact == "no"
        saved = Saved.open(path)
        tensors = {name: saved.tensor(name) for name in saved.names}
        pages = torch.empty(saved.n_pages, saved.page_bytes, dtype=torch.uint8)
        saved.reader.read(torch.arange(saved.n_pages), pages)
        for notes, says in (({}, "no"), ({"exact": "bit"}, "bit"), ({"exact": ["bit"]}, None)):
            told = {name: note for name, note in saved.notes.items() if name != "exact"} | notes
            write_saved(tmp_path / "b", told, tensors, [pages], saved.n_pages, saved.page_bytes)
            if says is None:
                with pytest.raises(SessionError, match="expected bit, rounding, verified, no"):
                    farkv.load_cache(tmp_path / "b", model)
            else:
                farkv.load_cache(tmp_path / "b", model)
                assert far.receipt().exact == says
