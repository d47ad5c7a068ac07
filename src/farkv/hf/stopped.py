"""Why an answer is no longer, and how long it is. In: the arguments of a `generate`, its output. Out: counts.

`generate` returns tokens, not why there are no more: of its conditions those that hold of the output are asked in turn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from farkv._axes import Int, Tensor
from farkv.account import END, INTERRUPTED, LENGTH, STOP_STRING, TIME, Account


class Asked(NamedTuple):
    """A call of `generate`: the model, the arguments with a name, and how many tokens its prompt has."""

    model: PreTrainedModel
    options: dict[str, Any]
    prompt_tokens: int

    def find(self, name: str) -> Any:
        """Return an option: it is given by name, in a configuration, or the model's own."""
        given = self.options.get("generation_config")
        for source in (given, getattr(self.model, "generation_config", None)):
            if self.options.get(name) is None and getattr(source, name, None) is not None:
                return getattr(source, name)
        return self.options.get(name)

    def find_ends(self, device: torch.device) -> Int[Tensor, " N"] | None:
        """Return the tokens that end an answer; None: it has no end."""
        ends = self.find("eos_token_id")
        return None if ends is None else torch.as_tensor(ends, device=device).flatten()

    def find_most(self) -> int | None:
        """Return how many new tokens there may be, None where nobody said it."""
        most, whole = self.find("max_new_tokens"), self.find("max_length")
        return most if most is not None or whole is None else whole - self.prompt_tokens


def note_answer(account: Account, asked: Asked, out: Any) -> None:
    """Count the new tokens that `generate` returned, and note why there are no more."""
    ids = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
    if not isinstance(ids, Tensor):
        # A `generate` of the user's own returns what it likes.
        return
    # Without ids of a prompt there are only new ones.
    new = ids if asked.options.get("inputs_embeds") is not None else ids[:, asked.prompt_tokens :]
    account.generated_tokens += new.shape[1]
    account.stop_reason = find_stop(asked, new)
    # A model without a token that ends an answer never ends one.
    account.is_cut = account.stop_reason == LENGTH and asked.find("eos_token_id") is not None


def note_interrupt(account: Account, asked: Asked, n_read: int) -> None:
    """Note that a person stopped the answer, when `n_read` tokens were read; the newest one is not yet."""
    if n_read >= asked.prompt_tokens:
        account.generated_tokens += n_read - asked.prompt_tokens + 1
    account.stop_reason, account.is_cut = INTERRUPTED, True


def find_stop(asked: Asked, new: Int[Tensor, "B T"]) -> str | None:
    """Return the name of the reason, that of a batch's last sequence to end; None: a rule of the caller's own."""
    ends, most = asked.find_ends(new.device), asked.find_most()
    ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    if ends is not None:
        ended = torch.isin(new, ends).any(1)
    if bool(ended.all()):
        return END
    has_strings = asked.find("stop_strings") is not None
    if most is None or new.shape[1] < most:
        if has_strings:
            return STOP_STRING
        if asked.find("max_time") is not None:
            return TIME
        return None if asked.options.get("stopping_criteria") or most is not None else LENGTH
    return STOP_STRING if has_strings and holds_string(asked, new[~ended]) else LENGTH


def holds_string(asked: Asked, new: Int[Tensor, "B T"]) -> bool:
    """Say whether every sequence holds one of the strings that end an answer."""
    strings, tokenizer = asked.find("stop_strings"), asked.options.get("tokenizer")
    strings = [strings] if isinstance(strings, str) else strings
    return tokenizer is not None and all(
        any(string in text for string in strings) for text in tokenizer.batch_decode(new)
    )
