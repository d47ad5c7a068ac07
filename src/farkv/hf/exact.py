"""Full attention's own answer from sparse drafts: the rounds.

1. Draft k tokens, each by a step that reads what the method chooses.  2. Forget them.  3. One pass over the last
decided token and the drafts reads everything, once.  4. What full attention would have said stands, and one token more.
5. Forget what stands behind that. The cache never keeps what a sparse step made.

In: a model, a cache, rows of decided tokens. Out: longer rows. Rows of a batch are in the cache up to the same token;
one that is ahead has its tokens fed as decided.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from farkv._axes import Float32, Int, Tensor
from farkv.account import VERIFIED
from farkv.errors import ConfigError
from farkv.hf.cache import FarCache
from farkv.hf.exact_rows import Row
from farkv.math.accept import Drafted
from farkv.math.draft_length import DraftLength
from farkv.math.lookup import find_continuation


class Passes:
    """Runs a model over the next columns of a batch.

    Args:
        arguments: what `generate` would call the model with, by keyword; the mask among them.
    """

    def __init__(self, model: Any, cache: FarCache, arguments: dict[str, Any]):
        self.model, self.cache, self.arguments = model, cache, arguments
        self.is_first = True

    def run(self, ids: Int[Tensor, "B N"], n_new: int, n_logits: int, *, whole: bool) -> Float32[Tensor, "B L V"]:
        """Run the last `n_new` of these tokens; return the logits of the last `n_logits`.

        Args:
            whole: read everything, however few they are.
        """
        arguments = extend_arguments(self.arguments, ids.shape[1])
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=n_new, is_first_iteration=self.is_first, **arguments
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = n_logits
        with self.cache.engine.mode.reading(whole=whole):
            logits = self.model(**inputs, return_dict=True).logits
        self.is_first = False
        return logits[:, -n_logits:].to(torch.float32)


def extend_arguments(arguments: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    """Return a call's arguments for so many tokens: the mask and what else is there for every token."""
    found = dict(arguments)
    mask = found.get("attention_mask")
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise ConfigError(f"exact: expected an attention_mask of [batch, tokens], got {list(mask.shape)}")
        found["attention_mask"] = fit(mask, n_tokens, 1)
    positions = found.get("position_ids")
    if isinstance(positions, Tensor):
        if positions.dim() != 2:
            raise ConfigError(f"exact: expected position_ids of [batch, tokens], got {list(positions.shape)}")
        more = torch.arange(1, max(0, n_tokens - positions.shape[1]) + 1, device=positions.device)
        found["position_ids"] = torch.cat([positions, positions[:, -1:] + more], 1)[:, :n_tokens]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if isinstance(found.get(name), Tensor):
            found[name] = fit(found[name], n_tokens, 0)
    return found


def fit(rows: Int[Tensor, "B N"], n: int, value: int) -> Int[Tensor, "B M"]:
    """Return the first `n` columns, with others of `value` where there are too few."""
    return torch.nn.functional.pad(rows, (0, max(0, n - rows.shape[1])), value=value)[:, :n]


class Generation:
    """The rounds of one call."""

    def __init__(self, passes: Passes, rows: list[Row], length: DraftLength, *, max_length: int, pad: int):
        self.passes, self.rows, self.length = passes, rows, length
        self.max_length, self.pad = max_length, pad
        self.cache = passes.cache
        self.count = passes.cache.account.drafts

    @property
    def active(self) -> list[Row]:
        """Return the rows that have not ended."""
        return [row for row in self.rows if not row.done]

    def collect(self, n_tokens: int) -> Int[Tensor, "B N"]:
        """Return the first `n_tokens` of every row, decided or drafted."""
        prefixes = [row.get_prefix()[:, :n_tokens] for row in self.rows]
        return torch.cat([fit(ids, n_tokens, self.pad) for ids in prefixes])

    def read_prompt(self, chunk: int) -> None:
        """Read what the cache does not hold of the prompt, and decide the first token."""
        n_tokens, held = self.rows[0].n_decided, self.cache.get_seq_length()
        if n_tokens - held > 1:
            chunk = min(chunk, self.cache.engine.announce_prompt(n_tokens, chunk))
        logits = None
        while held < n_tokens:
            held = min(n_tokens, held + chunk)
            n_new = held - self.cache.get_seq_length()
            logits = self.passes.run(self.collect(held), n_new, 1, whole=True)
        assert logits is not None
        for row, mine in zip(self.rows, logits, strict=True):
            row.take(mine, n_tokens - 1)

    def play_round(self) -> None:
        """Draft, verify, decide, and forget what does not stand."""
        held, account = self.cache.get_seq_length(), self.cache.account
        reads, n_active = account.list_reads(), len(self.active)
        room = max(0, self.max_length - held - 2)
        found = self.find_copies(room)
        k, copied = self.length.choose(len(found))
        k, start = min(k, room), time.perf_counter()
        if copied:
            self.rows[0].drafted = [Drafted(token, None) for token in found[:k]]
        else:
            self.draft(held, k)
        drafted = account.list_reads()
        drafted_s, start = time.perf_counter() - start, time.perf_counter()
        logits = self.passes.run(self.collect(held + k + 1), k + 1, k + 1, whole=True)
        verified_s = time.perf_counter() - start
        self.length.note_verification(k + 1, verified_s)
        before = sum(row.n_decided for row in self.rows)
        for row, mine in zip(self.rows, logits, strict=True):
            if not row.done:
                stood, tried = row.take(mine, held)
                self.length.note_acceptance(stood, tried, copied=copied)
                self.count.note_row(stood, tried)
        if k:
            account.note_exact(VERIFIED)
        n_tokens = sum(row.n_decided for row in self.rows) - before
        account.count_round(reads, drafted, k + 1, n_tokens / n_active)
        self.count.note_round(k, n_tokens, drafted_s, verified_s)
        # The last decided token was not fed yet. Of rows that have all ended, the longest is kept.
        keep = min((row.n_decided for row in self.active), default=max(row.n_decided for row in self.rows)) - 1
        self.cache.step_back(held + k + 1 - keep)

    def find_copies(self, room: int) -> list[int]:
        """Return what could be copied from the text; of a batch nothing: its rows would have to agree."""
        if len(self.rows) > 1 or self.length.fixed is not None:
            return []
        return find_continuation(self.rows[0].ids[0], min(room, self.length.most))

    def draft(self, held: int, k: int) -> None:
        """Draft until position `held + k`, and forget the drafts' records."""
        for i in range(k):
            start = time.perf_counter()
            logits = self.passes.run(self.collect(held + i + 1), 1, 1, whole=False)
            for row, mine in zip(self.rows, logits, strict=True):
                if not row.done and row.n_decided + len(row.drafted) <= held + i + 1:
                    row.draft(mine)
            self.length.note_draft(time.perf_counter() - start)
        if k:
            self.cache.step_back(k)

    def run(self, streamer: Any, chunk: int) -> None:
        """Decode until every row has ended; show a streamer what is decided."""
        shown = self.rows[0].n_decided
        self.read_prompt(chunk)
        while True:
            if streamer is not None:
                for token in self.rows[0].ids[0, shown:]:
                    streamer.put(token[None].cpu())
                shown = self.rows[0].n_decided
            if not self.active:
                break
            self.play_round()
        if streamer is not None:
            streamer.end()
