"""`farkv bench decode`: milliseconds of attention per layer and token, including selection and append.

In: settings. Out: a report. All methods are timed in the same run, interleaved round by round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from farkv.bench.case import Traffic, find_floor
from farkv.bench.fill import require_memory
from farkv.bench.machine import Machine, describe_machine
from farkv.bench.methods import Settings, check_native, count_bytes, make_runners
from farkv.bench.report import Report, Row, make_row
from farkv.bench.shapes import format_tokens
from farkv.bench.stopped import Keep
from farkv.bench.timing import Spread, measure_interleaved, summarize
from farkv.errors import ConfigError
from farkv.kernels.native import Native, load_native

# Progress callback: (done, total).
Tell = Callable[[int, int], None]


class Measured(NamedTuple):
    """One method at one context; its floor is computed after the machine's last bandwidth measurement."""

    method: str
    context: int
    spread: Spread
    traffic: Traffic | None
    more: dict[str, Any]


def measure_decode(settings: Settings, tell: Tell = lambda done, total: None) -> Report:
    """Measure every context and method.

    Raises:
        ConfigError: a method or peer is not available.
        CapacityError: a context does not fit in memory.
        Stopped: by Ctrl-C; it has the contexts that were finished.
    """
    native = load_native()
    settings, notes = check_native(settings, native)
    check_peers(settings)
    for context in settings.contexts:
        require_memory(count_bytes(settings, context), f"a context of {format_tokens(context)} tokens")
    machine = None if native is None else Machine(native, settings.fraction, buffer_bytes=settings.buffer_bytes)
    done, total = 0, len(settings.contexts) * (len(settings.methods) * (settings.rounds + 1) + len(settings.peers))

    def advance() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    tell(0, total)
    measured: list[Measured] = []
    with Keep(measured) as keep:
        for context in settings.contexts:
            measured += measure_context(settings, context, native, advance)
            for name in settings.peers:
                measured.append(measure_peer(settings, context, name))
                advance()
            if machine is not None:
                # Repeated between contexts, keeping the best: interference from other programs varies over time.
                machine.gather(settings.shape.record_bytes())
                machine.measure_again()
    # Who stops it does not wait for the machine to be measured to the end: then there is no floor.
    rows = make_rows(settings, measured, None if keep.cause else machine)
    kernel = "torch" if native is None else native.name
    found = describe_machine(machine, kernel, row_bytes=settings.shape.record_bytes())
    return keep.give(Report(title_of(settings), rows, found, settings.to_dict(), notes + explain(settings)))


def title_of(settings: Settings) -> str:
    """Return the report's title."""
    batch = f", batch {settings.batch}" if settings.batch > 1 else ""
    return f"decode, {settings.shape.name}{batch}: attention per layer and token, cap {settings.fraction:.1%}"


def explain(settings: Settings) -> list[str]:
    """Return notes needed to interpret the numbers."""
    notes = []
    if any(name.startswith("hf-") for name in settings.methods):
        notes.append("hf: DynamicCache copies all K and V with torch.cat at every token; its time includes that")
    if "hf-sdpa-bf16" in settings.methods:
        notes.append("hf-sdpa-bf16: torch's bfloat16 sdpa is slow for a single query on a CPU; compare matmul-bf16")
    return notes


def check_peers(settings: Settings) -> None:
    """Check that the peers can run, before anything is measured.

    Raises:
        ConfigError: a peer is not installed, or supports a single sequence only and the batch is larger.
    """
    if "llama.cpp" in settings.peers:
        from farkv.bench.llama_cpp import require_llama_cpp

        require_llama_cpp()
        if settings.batch > 1:
            raise ConfigError(f"--peer llama.cpp: supports --batch 1 only, got {settings.batch}; drop one of them")


def measure_peer(settings: Settings, context: int, name: str) -> Measured:
    """Measure an external program with its own KV cache; runs after the methods at the same context."""
    from farkv.bench.llama_cpp import measure_llama_cpp

    layers = settings.case(context).slow_layers
    seconds = measure_llama_cpp(settings.shape, layers, context, torch.get_num_threads(), settings.rounds)
    return Measured(name, context, summarize(seconds), None, {"layers": layers})


def measure_context(
    settings: Settings, context: int, native: Native | None, advance: Callable[[], None]
) -> list[Measured]:
    """Measure every method at one context; its memory is freed on return."""
    runners = make_runners(settings, context, native)
    seconds = measure_interleaved(runners, settings.rounds, advance=advance)
    found = []
    for runner in runners:
        more: dict[str, Any] = {"layers": runner.n_layers}
        if hasattr(runner, "account"):
            more |= {"index_fraction": runner.index_fraction, "kernel": runner.kernel_name}
        found.append(Measured(runner.name, context, summarize(seconds[runner.name]), runner.traffic, more))
    return found


def make_rows(settings: Settings, measured: list[Measured], machine: Machine | None) -> list[Row]:
    """Return the rows, each with the floor that the best measured bandwidth implies."""
    if machine is not None:
        for one in measured:
            if one.traffic is not None and one.traffic.row_bytes:
                machine.gather(one.traffic.row_bytes)
        machine.measure_again()
    rows = []
    for one in measured:
        floor: dict[str, Any] = {}
        if machine is not None and one.traffic is not None:
            floor_s = find_floor(one.traffic, machine.bandwidth)
            percent = round(100 * floor_s / one.spread.median_s, 1)
            floor = {"floor_ms": float(f"{1e3 * floor_s:.4g}"), "floor_percent": percent}
        read = 1.0 if one.traffic is None else one.traffic.read_fraction
        rows.append(
            make_row(one.method, one.context, settings.batch, one.spread, read_fraction=read, **floor, **one.more)
        )
    return rows
