"""From a loaded model to a receipt: read the text, feed the question, answer, and say how far each is.

In: a request. Out: the answer on stdout and its receipt; after Ctrl-C what there is of both.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from farkv.account import INTERRUPTED
from farkv.cli.interrupted import Interrupted
from farkv.cli.options import print_receipt
from farkv.cli.session import Request, open_session, open_text
from farkv.cli.terminal import err, write_answer
from farkv.errors import CacheStateError
from farkv.show import Tell, show_phases

if TYPE_CHECKING:
    from farkv.hf.ask import Listener
    from farkv.hf.cache import FarCache
    from farkv.receipt import Receipt


class SoFar:
    """What was read and said until now: tokens of the text, of the answer, and the answer."""

    def __init__(self) -> None:
        self.text_tokens = self.answer_tokens = 0
        self.pieces: list[str] = []

    def describe(self, read_tokens: int) -> str:
        """Return where a run was stopped, which has read so many tokens."""
        if self.answer_tokens:
            return f"after {self.answer_tokens:,} tokens of the answer"
        if self.text_tokens == 0:
            return "before anything was read"
        if read_tokens >= self.text_tokens:
            return "before the answer began"
        return f"while reading, after {read_tokens:,} of {self.text_tokens:,} tokens of the text"


def respond(request: Request, session: Path | None, *, query_aware: bool, as_json: bool) -> Receipt:
    """Answer a request, print the receipt and return it.

    Raises:
        Interrupted: by Ctrl-C; the answer and the receipt were printed as far as they were made.
    """
    so_far = SoFar()
    try:
        cache = answer_aloud(request, session, so_far, query_aware=query_aware, as_json=as_json)
    except KeyboardInterrupt as stop:
        raise Interrupted(end_early(request, so_far, as_json=as_json)) from stop
    if not as_json:
        typer.echo()
    # The demo's answers are four digits: as many tokens are asked for.
    if cache.account.is_cut and not as_json and request.name != "demo":
        most = request.decoding.max_new_tokens
        err.print(f"the answer was cut after {most} tokens; --max-new-tokens sets how many there may be")
    return print_account(request, so_far, request.far.receipt(cache), as_json=as_json)


def answer_aloud(
    request: Request, session: Path | None, so_far: SoFar, *, query_aware: bool, as_json: bool
) -> FarCache:
    """Read, feed and answer; return the cache that did."""
    from farkv.hf.ask import Listener, answer, prefill, read_question

    far, decoding = request.far, request.decoding

    def write(piece: str) -> None:
        so_far.pieces.append(piece)
        if not as_json:
            write_answer(piece)

    with show_phases(err, quiet=as_json) as phases:
        tell = phases.begin("reading")
        # A long text takes a while before its tokens are counted.
        tell(0, None)
        reading = listen(tell, so_far)
        if session:
            prompt, cache = open_session(request, session, reading)
        else:
            prompt, cache = open_text(request, query_aware=query_aware)
        if note := far.find_least(prompt.n_tokens).note:
            err.print(note, highlight=False)
        # Drafts are verified from a prompt that was read densely as a whole.
        prompt = prompt.read_question() if decoding.exact else prompt
        so_far.text_tokens = len(prompt.text)
        prefill(far, cache, prompt.text[cache.get_seq_length() :], decoding.chunk_tokens, reading)
        if not decoding.exact:
            prompt = read_question(far, cache, prompt, phases.begin("question"))
    # Only now: on a terminal the answer and a bar cannot stand on one line.
    with show_phases(err, quiet=as_json or sys.stdout.isatty()) as phases:
        tell = phases.begin("answering")

        def count(done: int, total: int) -> None:
            so_far.answer_tokens = done
            tell(done, total)

        listener = Listener(on_text=write, on_token=count)
        said = answer(far, request.tokenizer, prompt.read_question(), cache=cache, decoding=decoding, listener=listener)
    so_far.pieces = [said]
    return cache


def listen(tell: Tell, so_far: SoFar) -> Listener:
    """Return who is told about reading."""
    from farkv.hf.ask import Listener

    def on_prefill(done: int, total: int) -> None:
        so_far.text_tokens = max(so_far.text_tokens, total)
        tell(done, total)

    return Listener(on_prefill)


def end_early(request: Request, so_far: SoFar, *, as_json: bool) -> str:
    """Print what there is after Ctrl-C, if anything was read; return where that was."""
    if so_far.pieces and not as_json:
        typer.echo()
    try:
        receipt = request.far.receipt()
    except CacheStateError:
        return so_far.describe(0)
    receipt = dataclasses.replace(receipt, stop_reason=INTERRUPTED, generated_tokens=so_far.answer_tokens)
    print_account(request, so_far, receipt, as_json=as_json)
    return so_far.describe(receipt.context_tokens)


def print_account(request: Request, so_far: SoFar, receipt: Receipt, *, as_json: bool) -> Receipt:
    """Print the receipt, with the model as it was named and the answer, and return it."""
    whole = dataclasses.replace(receipt, model=request.name, answer="".join(so_far.pieces))
    print_receipt(whole, as_json=as_json)
    return whole
