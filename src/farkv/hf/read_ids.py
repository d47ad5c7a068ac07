"""Which tokens a cache has read, where their ids are known. In: ids of passes. Out: one text's ids."""

from __future__ import annotations

import torch

from farkv._axes import Int, Tensor


class ReadIds:
    """The ids of the first sequence's tokens; without those of every pass there is no text that can be saved."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._n = 0

    def get(self, n_tokens: int) -> Int[Tensor, " N"]:
        """Return at most `n_tokens` ids, in host memory."""
        ids = torch.cat(self._parts) if self._parts else torch.empty(0, dtype=torch.long)
        return ids[:n_tokens].to("cpu")

    def take(self, ids: Int[Tensor, " N"]) -> None:
        """Hold the ids of a text that was read before."""
        self._parts, self._n = [ids], len(ids)

    def clear(self) -> None:
        """Hold none."""
        self._parts, self._n = [], 0

    def note(self, ids: Int[Tensor, "B T"] | None, n_tokens: int) -> None:
        """Note the ids of the pass that begins, where `n_tokens` are held; None: they are not known."""
        n = self._n
        if n < 0:
            # It was stopped between the two last lines.
            n = sum(map(len, self._parts))
        if n > n_tokens:
            self._parts, n = [torch.cat(self._parts)[:n_tokens]], n_tokens
        self._n = -1
        if ids is not None:
            self._parts.append(ids[0].detach())
            n += ids.shape[1]
        self._n = n
