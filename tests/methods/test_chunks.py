"""A prompt may be read in any passes: whatever a method notes of it, and chooses by, is the same, to rounding.

Of every row of the table, in a batch of which one sequence is padded. The index has tests of its own (`test_indexed`):
there a toy's text is long enough for several fits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import farkv
from farkv.methods import XKV
from tests.hf.tape import Tape
from tests.methods.contract import Methods
from tests.methods.test_contract import EVERY
from tests.models import make_prompt, model_for

TOKENS, STEPS = 90, 3
PROMPT = make_prompt(2, tokens=TOKENS + STEPS, pad=34)
METHODS: dict[str, Methods] = EVERY | {
    "expected": (XKV(fraction=0.3, scorer="expected"),),
    "value": (XKV(fraction=0.3, scorer="value"),),
}
# What a pass of one token reads is chosen: it is a step.
SIZES = st.lists(st.integers(2, 40), min_size=1, max_size=12).map(lambda sizes: fill_up(sizes, TOKENS))


def fill_up(sizes: list[int], total: int) -> list[int]:
    """Return the first sizes, as many as fit, and what is left; none is of one token."""
    found: list[int] = []
    for n in sizes:
        if sum(found) + n <= total - 2:
            found.append(n)
    return [*found, total - sum(found)]


class Reading(NamedTuple):
    """What a cache read at every step, by layer, and what it had noted of the prompt, by name."""

    reads: list[dict[int, Any]]
    noted: dict[str, torch.Tensor]


def read(methods: Methods, sizes: list[int], near: str | None = None) -> Reading:
    """Read the prompt in passes of these sizes, then known tokens one by one."""
    model = model_for(*methods)
    with farkv.attach(model, *methods, profile=False, kernel="plain", near=near) as far:
        cache = far.new_cache(tokens=TOKENS + STEPS, batch=2)
        cache.engine.announce_prompt(TOKENS, TOKENS)
        noted, start = {}, 0
        with Tape(model, cache) as tape:
            for n in [*sizes, *[1] * STEPS]:
                if start == TOKENS:
                    noted = list_noted(cache.engine)
                mask = PROMPT["attention_mask"][:, : start + n]
                places = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:]
                ids = PROMPT["input_ids"][:, start : start + n]
                model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache)
                start += n
        return Reading([one.reads for one in tape.decode()], noted)


def list_noted(engine: Any) -> dict[str, torch.Tensor]:
    """Return every tensor that is known of the prompt besides its records; an index may be made at the first score."""
    found: dict[str, torch.Tensor] = {}
    for layer in engine.layers:
        # After an eviction they are made anew.
        if hasattr(engine.selector, "bounds") and engine.selector.bounds[layer].length:
            found[f"{layer}/bounds"] = engine.selector.bounds[layer].view(TOKENS - 1).clone()
        if hasattr(engine.selector, "fits") and engine.selector.fits[layer].index.projection is not None:
            found |= {f"{layer}/{k}": t for k, t in engine.selector.fits[layer].index.projection._asdict().items()}
        evictor = engine.parts.evictor
        if evictor is not None:
            observed = evictor.last[layer].observed
            found |= {f"{layer}/{k}": t for k, t in observed._asdict().items() if t is not None}
            if layer in engine.store.kept:
                kept = engine.store.kept[layer]
                found[f"{layer}/places"], found[f"{layer}/scores"] = (
                    kept.places.view().clone(),
                    kept.scores.view().clone(),
                )
    return found


WHOLE: dict[tuple[str, str | None], Reading] = {}


def check(name: str, sizes: list[int], near: str | None) -> None:
    if (name, near) not in WHOLE:
        WHOLE[name, near] = read(METHODS[name], [TOKENS], near)
    whole, other = WHOLE[name, near], read(METHODS[name], sizes, near)
    assert whole.noted.keys() == other.noted.keys()
    for key in whole.noted:
        expected, got = hide_padding(key, whole.noted[key]), hide_padding(key, other.noted[key])
        assert got.shape == expected.shape, key
        size = float(expected.abs().max()) if expected.numel() else 0.0
        # Of so few keys a table may code many exactly; what is then left of them is rounding, and so are later tables.
        least = 0.8 if key.endswith("tables") else 0.99
        if key.endswith("sampled"):
            # A head that gains as much as it loses by being drawn is drawn or not, by rounding: one of four here.
            assert (got != expected).float().mean() <= 0.25, key
            continue
        assert not size or torch.isclose(got, expected, rtol=1e-2, atol=1e-3 * size).float().mean() > least, key
    same = [compare(a[layer], b[layer]) for a, b in zip(whole.reads, other.reads, strict=True) for layer in a]
    assert len(other.reads) == STEPS
    assert min(same) > 0.9
    assert sum(same) / len(same) > 0.98


def hide_padding(key: str, noted: torch.Tensor) -> torch.Tensor:
    """Return what was noted without the queries of padding: a model computes something of it that nothing reads."""
    if not key.endswith(("window", "latest")):
        return noted.float()
    real = PROMPT["attention_mask"][:, None, TOKENS - noted.shape[2] : TOKENS, None].bool()
    return noted.masked_fill(~real, 0)


def compare(a: Any, b: Any) -> float:
    """Return the share of one choice's records that the other has, too; padding that is read is hidden by the mask."""
    flags = []
    for positions, valid in (a, b):
        keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        real = PROMPT["attention_mask"][:, None].bool().expand(*positions.shape[:2], -1)
        keep = keep & real.gather(-1, positions)
        flags.append(torch.zeros(*positions.shape[:2], TOKENS + STEPS).scatter_add_(-1, positions, keep.float()))
    return float((flags[0] * flags[1]).sum() / max(1.0, float(flags[0].sum())))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=2)
@given(sizes=SIZES)
@example(sizes=[2, 86, 2])
def test_any_passes_note_and_choose_as_one_does(name: str, sizes: list[int]) -> None:
    check(name, sizes, None)


@pytest.mark.parametrize("name", METHODS)
def test_any_passes_note_and_choose_as_one_does_where_records_travel(name: str) -> None:
    check(name, [31, 2, 48, 9], "1MiB")
