"""Drafting goes as far as it pays, and never where it does not."""

from __future__ import annotations

import pytest

from farkv.math.draft_length import COPIED, DRAFTED, DraftLength, count_tokens


def make(draft_s: float, verify_s: dict[int, float], acceptance: float = 0.9) -> DraftLength:
    length = DraftLength()
    length.acceptance[DRAFTED] = acceptance
    length.note_draft(draft_s)
    for n, seconds in verify_s.items():
        length.note_verification(n, seconds)
    return length


def test_plain_decoding_is_measured_first_and_drafting_next() -> None:
    length = DraftLength()
    assert length.choose() == (0, DRAFTED)
    length.note_verification(1, 1.0)
    assert length.choose()[0] > 0


def test_cheap_drafts_that_stand_are_drafted_far_and_dear_ones_not_at_all() -> None:
    assert make(0.01, {1: 1.0, 17: 1.1}, 0.99).choose()[0] == 16
    assert make(1.0, {1: 1.0, 17: 1.1}).choose() == (0, DRAFTED)
    assert 0 < make(0.2, {1: 1.0, 17: 1.1}, 0.8).choose()[0] < 16


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("draft_s", [0.01, 0.1, 0.4])
def test_the_choice_is_the_best_of_all(acceptance: float, draft_s: float) -> None:
    length = make(draft_s, {1: 1.0, 5: 1.1, 17: 1.6}, acceptance)
    k, _ = length.choose()
    rates = [count_tokens(acceptance, n) / (n * draft_s + length.estimate_verify_s(n + 1)) for n in range(17)]
    assert rates[k] == max(rates)


def test_where_it_does_not_pay_it_is_tried_again_later() -> None:
    length = make(2.0, {17: 1.0})
    chosen = []
    for _ in range(70):
        chosen.append(length.choose()[0])
        length.note_verification(1, 1.0)
    assert not any(chosen[:60])
    assert chosen[-1] > 0


def test_copies_cost_nothing_and_are_taken_where_they_stand() -> None:
    length = make(0.9, {1: 1.0, 17: 1.2}, 0.8)
    length.acceptance[COPIED] = 0.9
    assert length.choose(n_copied=8) == (8, COPIED)
    assert length.choose(n_copied=0)[1] == DRAFTED
    length.acceptance[COPIED] = 0.01
    assert length.choose(n_copied=8)[1] == DRAFTED


def test_acceptance_follows_what_stood() -> None:
    length = DraftLength()
    for _ in range(100):
        length.note_acceptance(1, 2, copied=DRAFTED)
    assert length.acceptance[DRAFTED] == pytest.approx(0.5, abs=0.05)
    assert length.acceptance[COPIED] == 0.5


def test_one_slow_pass_changes_nothing() -> None:
    length = make(0.05, {1: 1.0, 17: 1.2})
    for _ in range(4):
        length.note_draft(0.05)
    before = length.choose()
    length.note_draft(50.0)
    assert length.choose() == before
