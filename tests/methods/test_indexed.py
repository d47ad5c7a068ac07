"""The index is of the whole prompt: the same in whatever passes this was read, and wherever its records are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.methods import InfiniGen, LowBit
from farkv.methods.phase import Phase
from farkv.methods.watch import Watch
from tests.hf.tape import Tape
from tests.models import forward, make_model

TOKENS = 600
# One pass, even chunks, and uneven ones, of which the first alone has enough tokens for a skew.
PASSES = {"64": [64] * 9 + [24], "128": [128] * 4 + [88], "ragged": [70, 2, 301, 9, 216, 2]}
METHODS: dict[str, Any] = {
    "ours": InfiniGen(fraction=0.1, columns=6),
    "profile": InfiniGen(fraction=0.1, columns=6),
    "eight_bits": InfiniGen(fraction=0.1, columns=6, index_bits=8, source="attn"),
    "paper": InfiniGen(fraction=0.4, paper=True),
    "lowbit": LowBit(fraction=0.1, bits=4),
}
PLACES: dict[str, dict[str, str]] = {
    "in_place": {},
    "near": {"near": "192KiB"},
    "disk": {"near": "192KiB", "host": "192KiB", "disk": "DIR:16MiB"},
}
CASES = [
    *((method, "in_place", passes) for method in METHODS for passes in PASSES),
    *(("ours", place, passes) for place in ("near", "disk") for passes in PASSES),
    ("lowbit", "disk", "64"),
    ("profile", "near", "ragged"),
]


def make_text() -> torch.Tensor:
    """Return a text whose second half is of other words than its first."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(1, 12, (1, TOKENS // 2), generator=generator)
    return torch.cat([first, torch.randint(60, 97, (1, TOKENS // 2), generator=generator)], 1)


def read(far: Any, sizes: list[int], *, announced: bool) -> tuple[Any, list[dict[int, Any]]]:
    """Read the text in passes of these sizes and three more tokens; return the cache and what those read."""
    cache, text = far.new_cache(tokens=TOKENS + 4), make_text()
    if announced:
        cache.engine.announce_prompt(TOKENS, TOKENS)
    with Tape(far.model, cache) as tape:
        for part in text.split(sizes, 1):
            forward(far.model, part, cache)
        for token in range(20, 23):
            forward(far.model, torch.tensor([[token]]), cache)
    return cache, [one.reads for one in tape.decode()]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("method", "place", "passes"), CASES)
def test_any_passes_give_the_index_of_one(
    method: str, place: str, passes: str, announced: bool, tmp_path: Path
) -> None:
    model = make_model("llama")
    profile = farkv.profile(model, [make_text()[0, 200:400]]) if method == "profile" else False
    limits: Any = {name: value.replace("DIR", str(tmp_path)) for name, value in PLACES[place].items()}
    with farkv.attach(model, METHODS[method], profile=profile, kernel="plain", **limits) as far:
        whole, expected = read(far, [TOKENS], announced=False)
        other, got = read(far, PASSES[passes], announced=announced)
        assert far.receipt(other).kv_bytes.near_peak <= 192 * 1024 or not limits
        for layer, fit in whole.engine.selector.fits.items():
            if whole.engine.selector.reads_all(layer):
                continue
            index, again = fit.index, other.engine.selector.fits[layer].index
            phase = other.engine.selector.fits[layer].phase
            assert phase._replace(watch=Watch()) == Phase(fitted=[TOKENS]), "nothing else is left to be known"
            a, b = fit.phase.watch, phase.watch
            assert a._replace(shares=None) == b._replace(shares=None)
            assert a.n_queries == 0
            assert a.shares is None or abs(a.shares[0] - b.shares[0]) <= 1e-3 * a.shares[0]
            for name, a, b in zip(index.projection._fields, index.projection, again.projection, strict=True):
                assert not a.numel() or (a - b).abs().max() <= 1e-3 * a.abs().max(), f"layer {layer}: {name}"
            a, b = index.codes(), again.codes()
            # A key between two codes may be rounded either way.
            assert a.shape == b.shape
            assert torch.isclose(a.float(), b.float(), atol=1e-4).float().mean() > 0.99, f"layer {layer}"
        if place == "disk":
            # Which pages are in memory, and are chosen from for nothing, depends on how they came.
            return
        same = [compare(a[layer], b[layer]) for a, b in zip(expected, got, strict=True) for layer in a]
        assert min(same) > 0.9
        assert sum(same) / len(same) > 0.98


def compare(a: Any, b: Any) -> float:
    """Return the share of one choice's records that the other has, too."""
    flags = [torch.zeros(*x[0].shape[:2], TOKENS + 4).scatter_(-1, x[0], 1.0) for x in (a, b)]
    return float((flags[0] * flags[1]).sum() / flags[0].sum())


def test_where_nobody_looks_for_drift_a_turn_is_fitted_to_once_the_text_is_longer_by_half() -> None:
    model, text = make_model("llama"), make_text()
    with farkv.attach(model, METHODS["paper"], profile=False) as far:
        cache = far.new_cache()
        lengths: list[int] = []
        fitted: list[int] = []
        for part in text.split([200, 1, 9, 1, 88, 1, 9, 1, 290], 1):
            forward(model, part, cache)
            lengths.append(cache.get_seq_length())
            forward(model, part[:, :1], cache)
            fitted.append(cache.engine.selector.fits[1].phase.fitted[0])
        assert fitted == [200] * 4 + [lengths[4]] * 4 + [lengths[8]]
        check_codes(cache)


def check_codes(cache: Any) -> None:
    """An index that follows is of one projection, its own, in every layer."""
    selector = cache.engine.selector
    for layer, fit in selector.fits.items():
        if selector.reads_all(layer):
            continue
        keys = cache.engine.store.keys(layer)[:, :, : fit.index.length]
        assert (fit.index.codes() != selector.coder.encode(keys, fit.index.projection)).float().mean() < 0.01


def test_a_stopped_pass_and_a_session_leave_the_index_of_the_whole_prompt(tmp_path: Path) -> None:
    model, text = make_model("llama"), make_text()

    def fail(module: Any, args: Any, out: Any) -> None:
        raise InterruptedError

    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        whole, cache = far.new_cache(), far.new_cache()
        forward(model, text, whole)
        for part in text.split([256, 256, 88], 1):
            hook = model.model.layers[2].mlp.register_forward_hook(fail)
            with pytest.raises(InterruptedError):
                forward(model, part, cache)
            hook.remove()
            forward(model, part, cache)
        cache.save(tmp_path / "text")
        loaded = farkv.load_cache(tmp_path / "text", model, tokens=TOKENS + 4)
        for other in (cache, loaded):
            assert other.engine.selector.fits[1].phase.fitted == [TOKENS]
            for layer, fit in whole.engine.selector.fits.items():
                index, again = fit.index, other.engine.selector.fits[layer].index
                assert index.projection is not None
                assert again.projection is not None
                assert (index.projection.key - again.projection.key).abs().max() <= 1e-3
                assert (index.codes() == again.codes()).float().mean() > 0.99
        expected = forward(model, text[:, :1], whole)
        assert (forward(model, text[:, :1], cache) - expected).abs().max() <= 1e-4 * expected.abs().max()
