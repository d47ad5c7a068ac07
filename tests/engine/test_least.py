"""The least that a step can read: never undercut, reached where a cap asks for nothing, told where it binds."""

from __future__ import annotations

from typing import Any

import pytest

import farkv
from farkv.methods import H2O, XKV, Full, InfiniGen, Method, Pages, SnapKV, Window
from farkv.receipt import Receipt
from farkv.receipt_text import rows_of
from tests.models import generate, make_model, make_prompt

TOKENS, NEW = 150, 6


def run(method: Method, family: str = "llama", tokens: int = TOKENS, **options: Any) -> tuple[Receipt, Any]:
    """Return the receipt of a run, and what was said before it."""
    model = make_model(family)
    with farkv.attach(model, method, **options) as far:
        least = far.find_least(tokens)
        generate(model, make_prompt(1, tokens=tokens), far.new_cache(), n=NEW)
        return far.receipt(), least


@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("method", [InfiniGen, Window, Pages, XKV, SnapKV, H2O])
def test_no_run_reads_less_and_a_note_stands_where_one_reads_more_than_its_cap(
    method: Any, fraction: float, family: str
) -> None:
    receipt, before = run(method(fraction=fraction), family)
    assert 0 < receipt.least_read_fraction <= receipt.read_fraction + 1e-9
    # Before the run the context was shorter: shares of it were larger.
    assert receipt.least_read_fraction <= before.fraction
    if receipt.read_fraction > fraction + 1e-9:
        assert before.note.startswith(f"fraction {fraction:g} cannot be kept to")
    if family == "gemma3":
        assert "2 of 4 layers are not managed" in receipt.notes[0]
    if family == "llama" and not receipt.notes:
        assert receipt.read_fraction <= fraction + 1e-9


def test_the_least_is_what_a_cap_of_nothing_reads() -> None:
    receipt, before = run(XKV(fraction=0.01))
    # Window, sinks and the newest token.
    assert before.fraction == pytest.approx(13 / TOKENS)
    assert receipt.read_fraction == pytest.approx(before.fraction, rel=0.03)
    assert f"13 of {TOKENS + NEW - 1} records" in receipt.notes[0]


def test_fractions_of_managed_layers_stand_beside_those_of_all() -> None:
    receipt, _ = run(InfiniGen(fraction=0.1), "gemma3", tokens=400, near=70_000)
    managed = [row.read_fraction for row in receipt.layers if row.managed]
    assert receipt.managed_read_fraction == pytest.approx(sum(managed) / len(managed))
    assert receipt.managed_read_fraction <= 0.1 < receipt.read_fraction
    assert receipt.managed_resident_fraction > receipt.resident_fraction
    evicted, _ = run(XKV(fraction=0.2), "gemma3")
    assert evicted.managed_kept_fraction < evicted.kept_fraction < 1
    same, _ = run(InfiniGen(fraction=0.1))
    assert same.managed_read_fraction == same.read_fraction
    assert (same.managed_kept_fraction, same.managed_resident_fraction) == (1.0, same.resident_fraction)


def test_what_is_printed_shows_both_where_they_differ() -> None:
    names = [name for name, _, _ in rows_of(run(InfiniGen(fraction=0.1), "gemma3")[0])]
    assert {"managed, read", "least possible", "exact"} <= set(names)
    names = [name for name, _, _ in rows_of(run(InfiniGen(fraction=0.1))[0])]
    assert not {"managed, read", "managed, kept", "least possible"} & set(names)


@pytest.mark.parametrize("method", [Full(), InfiniGen(), InfiniGen(fraction=1.0), XKV(), InfiniGen(top_p=0.9)])
def test_what_asks_for_no_cap_is_told_of_none(method: Method) -> None:
    receipt, before = run(method, tokens=60)
    # That everything is read of a short context is another matter.
    assert (before.note, [note for note in receipt.notes if "crossover" not in note]) == ("", [])
    assert receipt.least_read_fraction <= receipt.read_fraction


def test_the_published_variant_counts_its_dense_layer() -> None:
    receipt, before = run(InfiniGen(fraction=0.4, paper=True))
    assert 0.25 < receipt.least_read_fraction <= receipt.read_fraction <= 0.4
    assert before.note == ""


def test_what_no_context_can_keep_to_is_said_when_a_model_is_attached(caplog: pytest.LogCaptureFixture) -> None:
    for family, fraction, says in (("gemma3", 0.01, True), ("gemma3", 0.9, False), ("llama", 0.01, False)):
        caplog.clear()
        with farkv.attach(make_model(family), InfiniGen(fraction=fraction)):
            assert ("fraction 0.01 cannot be kept to" in caplog.text) == says
