"""Filler of several kinds: there on every machine, of two disjoint sides, drawn from all kinds at once."""

from __future__ import annotations

import pytest

from farkv.errors import ConfigError
from farkv.evals import fillers
from farkv.evals.fillers import (
    FILLERS,
    MIXED,
    calibrates,
    draw_lines,
    list_telling,
    read_filler,
    read_vocabulary,
    share_known,
)


@pytest.mark.parametrize("kind", MIXED)
def test_every_kind_is_here_and_what_calibrates_does_not_measure(kind: str) -> None:
    measures, calibration = (read_filler(kind, calibration=side) for side in (False, True))
    assert measures
    # Of a few packages all licences may be the same ones.
    assert calibration or kind == "licences"
    assert not measures.keys() & calibration.keys()
    known = {line for text in measures.values() for line in list_telling(text)}
    assert all(share_known(text, known) < 0.5 for text in calibration.values())


def test_a_licence_with_another_name_in_it_is_a_copy() -> None:
    text = "".join(f"This is the long line number {i} of a licence.\n" for i in range(9))
    known = set(list_telling("Copyright by somebody, some day long ago\n" + text))
    assert share_known("Copyright by somebody else, another day\n" + text, known) == 0.9
    assert share_known("a text of a kind of its own, which nobody knows\n", known) == 0


def test_a_kind_without_texts_is_left_out_of_a_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    read = fillers.read_filler
    monkeypatch.setattr(fillers, "read_filler", lambda kind, **side: {} if kind == "licences" else read(kind, **side))
    assert 5000 < sum(map(len, draw_lines("mixed", 6000, 5, len, calibration=True))) <= 6000


def test_the_side_is_decided_by_the_name_alone() -> None:
    sides = [calibrates(f"text {i}") for i in range(400)]
    assert 0.15 < sum(sides) / len(sides) < 0.35


def test_mixed_lines_are_of_every_kind_and_fit() -> None:
    lines = draw_lines("mixed", 6000, 5, len)
    assert 5000 < sum(map(len, lines)) <= 6000
    whole = {line.rstrip("\n") for line in lines if len(line) > 30}
    for kind in MIXED:
        known = {line for text in read_filler(kind).values() for line in text.splitlines()}
        assert whole & known, kind


def test_lines_depend_on_the_seed_alone() -> None:
    first, again, other = (draw_lines("mixed", 2000, seed, len) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected mixed, code, manuals"):
        draw_lines("latin", 100, 0, len)
    assert "english" in FILLERS


def test_the_vocabulary_is_of_plain_words() -> None:
    words = read_vocabulary()
    assert len(set(words)) == len(words) > 2000
    assert all(word.isalpha() and word.islower() for word in words)
