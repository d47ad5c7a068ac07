"""What is counted during one run: reads, bytes, times, and how near it is to the plain model.

In: counts from the engine, passes and times from `hf`. Out: an `Account`, of which `hf` makes the receipt. Knows
nothing of models or tensor contents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from farkv.drafts import Drafts
from farkv.trace import ReadTrace

# How near a run is to the plain model: every pass was the model's own attention over all records as the model made
# them; or over all of them, but in blocks, by a kernel or in another order of sums; or tokens that were drafted by less
# are those that full attention over all of them decided; or something was left out or coded.
EXACT = BIT, ROUNDING, VERIFIED, INEXACT = ("bit", "rounding", "verified", "no")
# Why an answer is no longer: the model ended it, or it was as long as it may be; the caller's text or clock said so; or
# it was stopped from outside.
STOPS = END, LENGTH, STOP_STRING, TIME, INTERRUPTED = ("end", "length", "stop_string", "time", "interrupted")


@dataclass
class LayerCount:
    """Decode-step sums of one layer, in records (a record: one token of one KV head)."""

    read: float = 0.0
    held: float = 0.0
    # Counts that are computed on the device: summed there, read once for the receipt.
    device_read: Tensor | None = None
    index_bytes: float = 0.0
    mass_sum: float = 0.0
    mass_min: float = 1.0
    mass_steps: int = 0

    def add_read(self, read: float | Tensor, held: float) -> None:
        """Add one step: `read` of `held` records; a tensor stays on its device."""
        self.held += held
        if isinstance(read, Tensor):
            self.device_read = read if self.device_read is None else self.device_read + read
        else:
            self.read += read

    def total_read(self) -> float:
        """Return the number of records read. Cost: one device sync."""
        return self.read + (0.0 if self.device_read is None else float(self.device_read))

    def add_mass(self, mean: float, least: float) -> None:
        """Add the attention mass that one verified step found; NaN is none: there was no attention weight."""
        if not math.isfinite(mean):
            mean = least = 0.0
        self.mass_sum += mean
        self.mass_min = min(self.mass_min, least)
        self.mass_steps += 1

    def mass_mean(self) -> float | None:
        """Return the mean mass over verified steps; None if there were none."""
        return self.mass_sum / self.mass_steps if self.mass_steps else None


# What every layer has read and held.
Reads = dict[int, tuple[float, float]]


@dataclass
class Account:
    """All counters of a run; mutable."""

    layers: dict[int, LayerCount] = field(default_factory=dict)
    record_bytes: dict[int, int] = field(default_factory=dict)
    context_tokens: int = 0
    # Tokens that came from a session and not from a pass.
    session_tokens: int = 0
    decode_steps: int = 0
    timed_steps: int = 0
    generated_tokens: int = 0
    # Where an answer is generated: tokens of its prompt; None: a pass of one token is a step of an answer.
    prompt_tokens: int | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    # When the first pass began, by the clock; from then on, in seconds: the end of the pass that made the first token
    # of an answer, and of the last one.
    began: float | None = None
    first_token_s: float = 0.0
    total_s: float = 0.0
    fetched_bytes: int = 0
    disk_bytes: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    # Names of the fast kernels that ran at decode steps.
    kernels: set[str] = field(default_factory=set)
    agreements: list[bool] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    decoding: bool = False
    # Of the pass that runs: the decode steps among its tokens, its newest; whether it reads a token of an answer, and
    # whether one of its prompt; whether a pass has read a token of an answer.
    pass_steps: int = 0
    answering: bool = False
    ends_prompt: bool = True
    has_answered: bool = False
    # One of `STOPS`; None: nobody generated, or by rules of their own.
    stop_reason: str | None = None
    # Whether the answer was as long as it may be, and not at its end.
    is_cut: bool = False
    # False while a step is repeated for verification: the bytes it moves are not part of the run.
    counts_bytes: bool = True
    # The largest share of the records that one decode step has read, and what all steps before had read and held.
    peak_read: float = 0.0
    summed: tuple[float, float] = (0.0, 0.0)
    # Records the positions that decode steps read; None: not traced.
    trace: ReadTrace | None = None
    # The worst of `EXACT` of all passes so far.
    exact: str = BIT
    drafts: Drafts = field(default_factory=Drafts)

    def note_exact(self, how: str) -> None:
        """Note how near a pass came to the plain model: what a later one reads was made by it."""
        self.exact = max(self.exact, how, key=EXACT.index)

    def layer(self, layer: int) -> LayerCount:
        """Return the counts of one layer."""
        count = self.layers.get(layer)
        if count is None:
            count = self.layers[layer] = LayerCount()
        return count

    def begin_pass(self, n_new: int, n_before: int, announced: int = 0) -> int:
        """Note what a pass over `n_new` tokens is, which finds `n_before`; return how many of them are decode steps.

        Args:
            announced: tokens of a prompt that was announced outside of `generate`.
        """
        after, prompt = n_before + n_new, self.prompt_tokens
        if n_new == 1:
            steps = int(n_before > 0)
        elif prompt is not None:
            steps = max(0, after - max(n_before, prompt))
            # One token of the prompt that is left would have come alone.
            steps += int(n_before > 0 and n_new - steps == 1)
        else:
            # After the first step it is another turn or a guess: who knows announces a prompt.
            steps = n_new if self.decode_steps and after > announced else 0
        self.pass_steps, self.decoding = steps, steps == n_new
        # Tokens of an answer are read, and no more of its prompt.
        self.answering = after > prompt if prompt is not None else self.decoding
        self.ends_prompt = n_before < prompt if prompt is not None else not self.decoding
        return steps

    def count_pass(self, started: float, ended: float, *, measures: bool) -> None:
        """Count a forward pass, by the clock; a verified step, which `measures`, is not timed."""
        self.began = started if self.began is None else self.began
        self.total_s = ended - self.began
        if self.ends_prompt and not self.has_answered:
            self.first_token_s = self.total_s
        self.has_answered = self.has_answered or self.answering
        self.decode_steps += self.pass_steps
        if self.pass_steps:
            self._note_peak()
        if not self.decoding:
            # A prompt, and guesses that are checked with its end.
            self.prefill_s += ended - started
        elif not measures:
            self.timed_steps += self.pass_steps
            self.decode_s += ended - started

    def take_back_steps(self, n_tokens: int) -> None:
        """Forget the newest steps of an answer that is generated: their tokens were wrong guesses. Reads stay read."""
        if self.prompt_tokens is not None:
            self.decode_steps = max(0, self.decode_steps - n_tokens)
            self.timed_steps = max(0, self.timed_steps - n_tokens)

    def take_reading(self, other: Account) -> None:
        """Count what another cache's passes took to read this one's text, which then went through a session."""
        self.session_tokens, self.prefill_s, self.began = 0, other.prefill_s, other.began

    def list_reads(self) -> dict[int, tuple[float, float]]:
        """Return the records that every layer has read and held, over all decode steps. Cost: a sync on a device."""
        return {i: (count.total_read(), count.held) for i, count in self.layers.items()}

    def count_round(self, before: Reads, drafted: Reads, n_verified: int, n_tokens: float) -> None:
        """Count a round of drafts and their verification as what it was: drafts' reads, and one of everything.

        Args:
            before, drafted: what was read before the round, and before its verification.
            n_verified: tokens of the verifying pass: each was counted as if it had read alone.
            n_tokens: that the round decided, of one row: as many steps of plain decoding.
        """
        for i, count in self.layers.items():
            read, held = before.get(i, (0.0, 0.0))
            draft = drafted.get(i, (read, held))[0]
            whole = (count.total_read() - draft) / n_verified
            count.read, count.device_read = draft + whole, None
            count.held = held + whole * n_tokens
        self.summed = self._sum_reads()

    def _note_peak(self) -> None:
        """Note what this step has read, if no count of it has stayed on a device."""
        if any(count.device_read is not None for count in self.layers.values()):
            return
        was_read, was_held = self.summed
        self.summed = read, held = self._sum_reads()
        if held > was_held:
            self.peak_read = max(self.peak_read, (read - was_read) / (held - was_held))

    def _sum_reads(self) -> tuple[float, float]:
        """Return the bytes read and held over all layers, where counts are no tensors."""
        sizes = {i: self.record_bytes.get(i, 1) for i in self.layers}
        read = sum(count.read * sizes[i] for i, count in self.layers.items())
        return read, sum(count.held * sizes[i] for i, count in self.layers.items())

    def add_fallback(self, name: str) -> None:
        """Count one use of a slower or different path than the one requested."""
        self.fallbacks[name] = self.fallbacks.get(name, 0) + 1

    def count_fetch(self, n_bytes: int) -> None:
        """Count bytes that crossed the link; decode steps only."""
        if self.decoding and self.counts_bytes:
            self.fetched_bytes += n_bytes

    def count_disk(self, n_bytes: int) -> None:
        """Count bytes read from disk; decode steps only."""
        if self.decoding and self.counts_bytes:
            self.disk_bytes += n_bytes

    def read_fraction(self, layers: list[int] | None = None) -> float:
        """Return the bytes of the selected records over those of all records, over all decode steps.

        Args:
            layers: count these alone; None: all.
        """
        counts = {i: c for i, c in self.layers.items() if layers is None or i in layers}
        read = sum(c.total_read() * self.record_bytes.get(i, 1) for i, c in counts.items())
        held = sum(c.held * self.record_bytes.get(i, 1) for i, c in counts.items())
        return read / held if held else 0.0

    def index_fraction(self) -> float:
        """Return the index bytes scored over the bytes of all records, over all layers and decode steps."""
        scored = sum(c.index_bytes for c in self.layers.values())
        held = sum(c.held * self.record_bytes.get(i, 1) for i, c in self.layers.items())
        return scored / held if held else 0.0
