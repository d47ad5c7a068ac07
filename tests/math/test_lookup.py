"""What followed the same tokens before."""

from __future__ import annotations

import torch

from farkv.math.lookup import find_continuation


def find(ids: list[int], most: int = 4) -> list[int]:
    return find_continuation(torch.tensor(ids), most)


def test_the_newest_place_of_the_longest_run_counts() -> None:
    assert find([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3]) == [8, 7, 1, 2]
    # Four same tokens are better than three, however old.
    assert find([5, 1, 2, 3, 9, 4, 1, 2, 3, 8, 5, 1, 2, 3], 1) == [9]


def test_nothing_is_found_where_nothing_repeats() -> None:
    assert find([1, 2, 3, 4, 5]) == []
    assert find([1]) == []
    assert find([1, 2, 3, 9, 3]) == []


def test_a_run_may_reach_into_what_it_continues() -> None:
    assert find([7, 7, 7, 7]) == [7]
    assert find([1, 2, 1, 2, 1, 2], 3) == [1, 2]


def test_it_is_what_a_plain_search_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        ids = torch.randint(0, 4, (20,), generator=generator).tolist()
        expected: list[int] = []
        for size in (4, 3, 2):
            ends = [i for i in range(size, len(ids)) if ids[i - size : i] == ids[-size:]]
            if ends:
                expected = ids[ends[-1] : ends[-1] + 4]
                break
        assert find(ids) == expected
