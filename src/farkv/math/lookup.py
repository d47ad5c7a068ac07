"""Drafts for nothing: what followed the last few tokens when they stood in the text before (prompt lookup)."""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor

# Tokens that must be the same: the most that are tried first, and the fewest that say anything.
LONGEST, SHORTEST = 4, 2


def find_continuation(ids: Int[Tensor, " N"], most: int) -> list[int]:
    """Return up to `most` tokens that followed the newest earlier place where the last tokens stood; else none.

    The longest run of last tokens that stood before counts.

    Args:
        ids: of one text.

    Cost: a few passes over the ids, and a deliberate sync.
    """
    n = ids.shape[0]
    for size in range(min(LONGEST, n - 1), SHORTEST - 1, -1):
        # Where the last of `size` same tokens stands, the end itself left out.
        same = torch.ones(n - size, dtype=torch.bool, device=ids.device)
        for back in range(size):
            same &= ids[size - 1 - back : n - 1 - back] == ids[n - 1 - back]
        found = same.nonzero()
        if found.numel():
            start = int(found[-1]) + size
            return ids[start : start + most].tolist()
    return []
