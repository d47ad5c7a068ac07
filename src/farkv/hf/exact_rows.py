"""The rows of an exact generation: what is decided of each, how far ahead it is of the cache, and when it ends.

In: processed scores of drafts and of full attention. Out: decided tokens, in order, each shown to the stopping criteria
as `generate` would have shown it.
"""

from __future__ import annotations

from typing import Any

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.math.accept import Drafted, Noise, settle


class Row:
    """One sequence.

    ids: its decided tokens, [1, N], padding included.  drafted: what was drafted to follow them.
    """

    def __init__(self, ids: Int[Tensor, "1 N"], noise: Noise, criteria: Any, processor: Any):
        self.ids, self.noise, self.criteria, self.processor = ids, noise, criteria, processor
        self.drafted: list[Drafted] = []
        self.done = False
        # Processed scores of the decided tokens, where they are asked for.
        self.scores: list[Tensor] | None = None

    @property
    def n_decided(self) -> int:
        """Return the number of decided tokens."""
        return self.ids.shape[1]

    def get_prefix(self) -> Int[Tensor, "1 N"]:
        """Return the decided and the drafted tokens."""
        if not self.drafted:
            return self.ids
        more = torch.tensor([[d.token for d in self.drafted]], device=self.ids.device)
        return torch.cat([self.ids, more], 1)

    def process(self, prefix: Int[Tensor, "1 N"], logits: Float32[Tensor, "1 V"]) -> Float32[Tensor, " V"]:
        """Return log-probabilities of the token behind a prefix, or for the likeliest token its scores."""
        scores = self.processor(prefix, logits)[0]
        return scores if self.noise.seed is None else scores.log_softmax(-1)

    def draft(self, logits: Float32[Tensor, "1 V"]) -> None:
        """Draft one more token."""
        prefix = self.get_prefix()
        log_q = self.process(prefix, logits)
        self.drafted.append(Drafted(self.noise.draw(log_q, prefix.shape[1]), log_q))

    def take(self, logits: Float32[Tensor, "T V"], first: int) -> tuple[int, int]:
        """Decide tokens by full attention's logits, one behind the other, as far as they stand.

        Args:
            logits: of the tokens that follow positions `first`, `first + 1`, ...: of tokens as they were drafted.

        Returns:
            How many drafted tokens stood, and how many were looked at.
        """
        drafted, self.drafted = self.drafted, []
        start, n_stood, n_tried = self.n_decided, 0, 0
        for i in range(start - 1 - first, logits.shape[0]):
            if self.done:
                break
            at = first + i + 1 - start
            mine = drafted[at] if at < len(drafted) else None
            scores = self.process(self.ids, logits[i : i + 1])
            token = settle(mine, scores, self.noise, self.n_decided)
            self.append(token, scores)
            if mine is None:
                break
            n_tried += 1
            if token != mine.token:
                break
            n_stood += 1
        return n_stood, n_tried

    def append(self, token: int, scores: Float32[Tensor, " V"]) -> None:
        """Decide one more token, and see whether it is the last."""
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
        if self.scores is not None:
            self.scores.append(scores)
        # A deliberate sync: criteria answer on the device.
        self.done = bool(self.criteria(self.ids, None)[0])
