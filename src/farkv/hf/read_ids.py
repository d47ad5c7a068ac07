"""Which tokens a cache has read, where their ids are known. In: ids of passes. Out: one text's ids."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from farkv._axes import Int, Tensor


class ReadIds:
    """The ids of all sequences' tokens; without those of every pass there is no text that can be saved."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._n = 0

    def get(self, n_tokens: int) -> Int[Tensor, " N"]:
        """Return at most `n_tokens` ids, in host memory."""
        ids = [part[0] for part in self._parts]
        return (torch.cat(ids) if ids else torch.empty(0, dtype=torch.long))[:n_tokens].to("cpu")

    def take(self, ids: Int[Tensor, " N"]) -> None:
        """Hold the ids of a text that was read before."""
        self._parts, self._n = [ids[None]], len(ids)

    def select(self, sequences: Int[Tensor, " N"]) -> None:
        """Keep these sequences of the batch, in this order."""
        # A mask, a slice's result or numbers: indexing understands them all.
        self._parts = [part[sequences.to(part.device)] for part in self._parts]

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._parts = [part.repeat_interleave(repeats, 0) for part in self._parts]

    def clear(self) -> None:
        """Hold none."""
        self._parts, self._n = [], 0

    def note(self, ids: Int[Tensor, "B T"] | None, n_tokens: int) -> None:
        """Note the ids of the pass that begins, where `n_tokens` are held; None: they are not known."""
        n = self._n
        if n < 0:
            # It was stopped between the two last lines.
            n = sum(part.shape[1] for part in self._parts)
        if n > n_tokens:
            self._parts, n = list(cut(self._parts, n_tokens)), n_tokens
        self._n = -1
        if ids is not None:
            self._parts.append(ids.detach())
            n += ids.shape[1]
        self._n = n


def cut(parts: list[Tensor], n_tokens: int) -> Iterator[Tensor]:
    """Yield the ids of passes up to a number of tokens."""
    for part in parts:
        if n_tokens > 0:
            yield part[:, :n_tokens]
        n_tokens -= part.shape[1]
