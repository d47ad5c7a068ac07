"""`farkv bench`: how fast this machine decodes from a long context, and how near that is to what its memory allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farkv.cli.options import JsonOption, err
from farkv.errors import ConfigError
from farkv.show import show_progress

if TYPE_CHECKING:
    from farkv.bench.report import Report

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure speed: farkv beside its baselines, in one run, on random records of real models' shapes.",
)

ShapeOption = Annotated[str, typer.Option(help="llama3-8b, llama3.2-1b, qwen3-8b or opt-6.7b.")]
ContextsOption = Annotated[str, typer.Option(help="Tokens, with commas: 8192,32K.")]
LayersOption = Annotated[
    int | None, typer.Option(min=1, help="Layers. Default: as many as no cache of the processor holds.")
]
BatchOption = Annotated[int, typer.Option(min=1, max=256, help="Sequences.")]
CapOption = Annotated[float, typer.Option(min=0.001, max=1.0, help="Hard cap on the KV bytes read per step.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads. Default: torch's own setting.")]
MethodsOption = Annotated[str | None, typer.Option(help="Names, with commas. Default: all but the optional ones.")]
PlotOption = Annotated[Path | None, typer.Option(help="Draw ms per layer over the context, e.g. bench.png.")]


@app.callback(invoke_without_command=True)
def bench(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure from which context on choosing records is faster; keep it.")
    ] = False,
) -> None:
    r"""Measure speed: farkv beside its baselines, in one run, on random records of real models' shapes.

    [bold]Examples[/bold]

      farkv bench decode

      farkv bench decode --contexts 32K,128K --threads 1 --plot bench.png

      farkv bench --calibrate
    """
    if calibrate:
        calibrate_machine(None, as_json=False)
        raise typer.Exit


@app.command()
def decode(
    shape: ShapeOption = "llama3-8b",
    contexts: ContextsOption = "8K,32K",
    layers: LayersOption = None,
    batch: BatchOption = 1,
    fraction: CapOption = 0.05,
    threads: ThreadsOption = None,
    methods: MethodsOption = None,
    peer: Annotated[list[str] | None, typer.Option(help="Another program beside them: llama.cpp.")] = None,
    quant: Annotated[bool, typer.Option("--quant", help="Add infinigen over int8 and int4 records.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; slow methods take part in fewer.")] = 12,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="As farkv bench --calibrate, with --threads and --json.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time attention of one layer and token: appending its record, choosing, reading.

    [bold]Methods[/bold]

      infinigen

      dense-native: every record, by the native kernel: the honest baseline

      matmul-bf16, matmul-fp32: torch, over a preallocated cache

      hf-sdpa-bf16, hf-sdpa-fp32: Hugging Face's cache and attention

      only if named: hf-eager-bf16, hf-eager-fp32, infinigen-int8, infinigen-int4

    [bold]Examples[/bold]

      farkv bench decode

      farkv bench decode --contexts 32K,128K --threads 1 --json

      farkv bench decode --shape opt-6.7b --contexts 2K --batch 4 --layers 4

      farkv bench decode --contexts 1K,4K,16K,64K --plot bench.png
    """
    if calibrate:
        calibrate_machine(threads, as_json=as_json)
        return
    set_threads(threads)
    from farkv.bench.decode import measure_decode
    from farkv.bench.methods import CODED, DEFAULT, Settings
    from farkv.bench.report import draw_rows
    from farkv.bench.shapes import find_shape, parse_contexts

    names = split_names(methods, DEFAULT) + (tuple(CODED) if quant else ())
    settings = Settings(
        find_shape(shape), tuple(parse_contexts(contexts)), tuple(dict.fromkeys(names)), tuple(peer or ()),
        batch=batch, fraction=fraction, layers=layers, rounds=rounds,
    )  # fmt: skip
    with show_progress(err, "decode", quiet=False) as tell:
        report = measure_decode(settings, tell)
    finish(report, draw_rows(report), plot, as_json=as_json)


@app.command()
def gather(threads: ThreadsOption = None, as_json: JsonOption = False) -> None:
    r"""Measure the floor: bytes per second read in sequence, and in sorted, prefetched rows.

    [bold]Examples[/bold]

      farkv bench gather --threads 1
    """
    set_threads(threads)
    from farkv.bench.gather import draw_gather, measure_rows

    with show_progress(err, "gather", quiet=False) as tell:
        report = measure_rows(tell)
    err.print(draw_gather(report))
    if as_json:
        typer.echo(json.dumps(report.to_dict()))


@app.command()
def prefill(
    shape: ShapeOption = "llama3.2-1b",
    contexts: ContextsOption = "4K",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 2,
    batch: BatchOption = 1,
    fraction: Annotated[float | None, typer.Option(help="As of the method; default: its own.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 where the processor multiplies it.")] = "float32",
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts that each reads.")] = 3,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time reading a prompt: a random-weight model with farkv attached, and the same without, chunk by chunk in turn.

    [bold]Examples[/bold]

      farkv bench prefill

      farkv bench prefill --shape qwen3-8b --contexts 2K,8K --json
    """
    set_threads(threads)
    from farkv.bench.prefill import DTYPES, PrefillSettings, measure_prefill
    from farkv.bench.report import draw_rows
    from farkv.bench.shapes import find_shape, parse_contexts

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    settings = PrefillSettings(
        find_shape(shape), tuple(parse_contexts(contexts)), layers, batch, rounds,
        chunk_tokens=chunk, dtype=dtype, fraction=fraction,
    )  # fmt: skip
    with show_progress(err, "prefill", quiet=False) as tell:
        report = measure_prefill(settings, tell)
    finish(report, draw_rows(report), plot, as_json=as_json)


@app.command()
def e2e(
    shape: ShapeOption = "llama3.2-1b",
    contexts: ContextsOption = "8K,32K",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model. Default: all of the shape.")] = None,
    batch: BatchOption = 1,
    fraction: CapOption = 0.05,
    own: Annotated[
        bool, typer.Option("--own-fraction", help="As without a fraction: short contexts are read whole.")
    ] = False,
    threads: ThreadsOption = None,
    methods: Annotated[str | None, typer.Option(help="infinigen, hf-sdpa-bf16, hf-eager-bf16.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; slow methods take part in fewer.")] = 5,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time whole tokens of a random-weight model in bfloat16, caches filled directly, and how that grows with context.

    [bold]Examples[/bold]

      farkv bench e2e

      farkv bench e2e --contexts 2K,32K --threads 1 --json
    """
    set_threads(threads)
    from farkv.bench.e2e import DEFAULT, ModelSettings, draw_model, measure_model
    from farkv.bench.shapes import find_shape, parse_contexts

    found = find_shape(shape)
    settings = ModelSettings(
        found, tuple(parse_contexts(contexts)), layers or found.layers, split_names(methods, DEFAULT),
        batch=batch, fraction=None if own else fraction, rounds=rounds,
    )  # fmt: skip
    with show_progress(err, "e2e", quiet=False) as tell:
        report = measure_model(settings, tell)
    finish(report, draw_model(report), plot, as_json=as_json)


def calibrate_machine(threads: int | None, *, as_json: bool) -> None:
    """Measure where choosing becomes faster than reading all, and keep it."""
    set_threads(threads)
    from farkv.bench.calibrate import calibrate, draw_calibration

    with show_progress(err, "calibrate", quiet=False) as tell:
        found = calibrate(tell)
    err.print(draw_calibration(found))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))


def set_threads(threads: int | None) -> None:
    """Set torch's threads, which farkv's kernels follow."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def split_names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a list with commas."""
    return default if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def finish(report: Report, table: Any, plot: Path | None, *, as_json: bool) -> None:
    """Print the table on stderr, draw the picture, and print the object as stdout's last line."""
    err.print(table)
    if plot is not None:
        from farkv.bench.plot import plot_rows

        plot_rows(report, plot)
        err.print(f"wrote {plot}", highlight=False)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
