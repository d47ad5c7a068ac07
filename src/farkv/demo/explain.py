"""What the demo shows, in words. In: its prompt, the receipt of its run. Out: a few lines."""

from __future__ import annotations

import math

from farkv.config import format_bytes
from farkv.demo.recall import RecallPrompt
from farkv.receipt import Receipt

# The demo model's KV cache takes 4 KiB a token in half precision: of this many tokens near memory holds about a sixth.
NEAR_TOKENS_PER_MIB = 1600


def choose_near(tokens: int) -> str:
    """Return a near limit for a text of so many tokens that is far below its KV cache, so that records travel."""
    return f"{math.ceil(tokens / NEAR_TOKENS_PER_MIB)}MiB"


def explain_run(prompt: RecallPrompt, receipt: Receipt) -> list[str]:
    """Return what a user has just seen: bytes, the near limit, what was read, whether the answer is right."""
    size, near = receipt.kv_bytes, receipt.limits.near
    limit = "without a limit" if near is None else f"and never above its limit of {format_bytes(near)}"
    right = receipt.answer.strip() == prompt.answer
    found = (
        f"right: line {prompt.fact_line + 1} says so"
        if right
        else f"wrong: line {prompt.fact_line + 1} says {prompt.answer}"
    )
    lines = [
        "What you have just seen:",
        f"- {receipt.context_tokens:,} tokens have {format_bytes(size.total)} of KV cache, all of it in the pool (host "
        f"memory); near memory held {receipt.resident_fraction:.1%} of it at most, {limit}.",
        f"- Each step read {receipt.read_fraction:.1%} of the cache, found by an index, and fetched "
        f"{format_bytes(receipt.fetched_bytes_per_token)} of records from the pool.",
        f"- The answer {receipt.answer.strip()!r} is {found}." + describe_quality(receipt),
        '- On your model and text: farkv run --model NAME_OR_PATH --file book.txt --near 2GiB "Who wrote the letter?"',
    ]
    return lines


def describe_quality(receipt: Receipt) -> str:
    """Return how often the full cache's first choice was the same, if steps were compared."""
    if receipt.quality is None:
        return ""
    same = round(receipt.quality.top1_agreement * receipt.quality.steps)
    return f" Of {receipt.quality.steps} steps that were compared, {same} chose the token that the full cache chooses."
