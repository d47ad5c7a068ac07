"""`farkv bench`: decode speed over a long context on this machine, compared with its memory bandwidth."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.bench_model import choose_dtype, choose_peer, choose_shape, choose_whole
from farkv.cli.bench_report import finish, measure, print_object
from farkv.cli.options import JsonOption, WeightsOption
from farkv.errors import ConfigError

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

SHAPES = "llama3-8b, llama3.2-1b, qwen3-8b or opt-6.7b."
ShapeOption = Annotated[str | None, typer.Option(help=SHAPES, show_default="llama3-8b")]
WholeShapeOption = Annotated[str | None, typer.Option(help=SHAPES, show_default="llama3.2-1b")]
RealOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A real model instead of --shape: demo, a folder, a GGUF file or a hub id."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; with --model also auto (the default).", show_default=False),
]
ContextsOption = Annotated[str, typer.Option(help="Context lengths in tokens, comma-separated: 8192,32K.")]
LayersOption = Annotated[
    int | None, typer.Option(min=1, help="Layers. Default: enough to exceed the processor's caches.")
]
BatchOption = Annotated[int, typer.Option(min=1, max=256, help="Batch size, in sequences.")]
CapOption = Annotated[float, typer.Option(min=0.001, max=1.0, help="Hard cap on the KV bytes read per step.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads. Default: torch's setting.")]
MethodsOption = Annotated[str | None, typer.Option(help="Names, comma-separated. Default: all but the optional ones.")]
PlotOption = Annotated[Path | None, typer.Option(help="Plot ms per layer against context, e.g. bench.png.")]


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the context from which selecting is faster, and save it.")
    ] = False,
    shape: WholeShapeOption = None,
    model: RealOption = None,
    dtype: DtypeOption = None,
) -> None:
    r"""Measure speed: farkv and its baselines in one run, on random records with the shapes of real models.

    The options here are for --calibrate; every command has its own.

    [bold]Examples[/bold]

      farkv bench decode

      farkv bench decode --contexts 32K,128K --threads 1 --plot bench.png

      farkv bench --calibrate --model NAME_OR_PATH
    """
    if calibrate:
        calibrate_machine(None, (shape, model, dtype), as_json=False)
        raise typer.Exit
    if context.invoked_subcommand and (shape or model or dtype):
        raise ConfigError(
            f"bench: --shape, --model and --dtype stand behind {context.invoked_subcommand}, or with --calibrate"
        )


@app.command()
def decode(
    shape: ShapeOption = None,
    model: RealOption = None,
    contexts: ContextsOption = "8K,32K",
    layers: LayersOption = None,
    batch: BatchOption = 1,
    fraction: CapOption = 0.05,
    threads: ThreadsOption = None,
    methods: MethodsOption = None,
    peer: Annotated[list[str] | None, typer.Option(help="Also measure another program: llama.cpp.")] = None,
    quant: Annotated[bool, typer.Option("--quant", help="Add infinigen over int8 and int4 records.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; slow methods run fewer.")] = 12,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="As farkv bench --calibrate, with --threads and --json.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time the attention of one layer and token: append its record, select, read.

    [bold]Methods[/bold]

      infinigen

      dense-native: reads every record, native kernel: the strongest baseline

      matmul-bf16, matmul-fp32: torch, over a preallocated cache

      hf-sdpa-bf16, hf-sdpa-fp32: Hugging Face's cache and attention

      optional: hf-eager-bf16, hf-eager-fp32, infinigen-int8, infinigen-int4

    [bold]Examples[/bold]

      farkv bench decode

      farkv bench decode --contexts 32K,128K --threads 1 --json

      farkv bench decode --shape opt-6.7b --contexts 2K --batch 4 --layers 4

      farkv bench decode --contexts 1K,4K,16K,64K --plot bench.png
    """
    if calibrate:
        calibrate_machine(threads, (shape, model, None), as_json=as_json)
        return
    set_threads(threads)
    from farkv.bench.decode import measure_decode
    from farkv.bench.methods import CODED, DEFAULT, Settings
    from farkv.bench.report import draw_rows
    from farkv.bench.shapes import parse_contexts

    names = split_names(methods, DEFAULT) + (tuple(CODED) if quant else ())
    settings = Settings(
        choose_shape(shape, model, "llama3-8b"), tuple(parse_contexts(contexts)), tuple(dict.fromkeys(names)),
        tuple(peer or ()),
        batch=batch, fraction=fraction, layers=layers, rounds=rounds,
    )  # fmt: skip
    report = measure("decode", partial(measure_decode, settings), draw_rows, as_json=as_json)
    finish(report, plot, as_json=as_json)


@app.command()
def gather(threads: ThreadsOption = None, as_json: JsonOption = False) -> None:
    r"""Measure memory bandwidth: sequential reads, and sorted, prefetched row reads.

    [bold]Examples[/bold]

      farkv bench gather --threads 1
    """
    set_threads(threads)
    from farkv.bench.gather import draw_gather, measure_rows

    print_object(measure("gather", measure_rows, draw_gather, as_json=as_json), as_json=as_json)


@app.command()
def prefill(
    shape: WholeShapeOption = None,
    model: RealOption = None,
    contexts: ContextsOption = "4K",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model. Default: 2.")] = None,
    batch: BatchOption = 1,
    fraction: Annotated[float | None, typer.Option(help="Default: the method's own.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 2048,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts per model.")] = 3,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time prefill: a random-weight or real model with and without farkv, alternating chunk by chunk.

    [bold]Examples[/bold]

      farkv bench prefill

      farkv bench prefill --shape qwen3-8b --contexts 2K,8K --json

      farkv bench prefill --model qwen2.5-1.5b-q4_k_m.gguf --contexts 2K
    """
    set_threads(threads)
    from farkv.bench.prefill import PrefillSettings, measure_prefill
    from farkv.bench.report import draw_rows
    from farkv.bench.shapes import parse_contexts

    tokens = tuple(parse_contexts(contexts))
    whole = choose_whole(shape, model, layers or (None if model else 2), dtype or ("auto" if model else "float32"))
    settings = PrefillSettings(
        whole.shape, tokens, whole.layers, batch, rounds,
        chunk_tokens=chunk, dtype=whole.dtype, fraction=fraction, model=whole.model,
    )  # fmt: skip
    report = measure("prefill", partial(measure_prefill, settings), draw_rows, as_json=as_json)
    finish(report, plot, as_json=as_json)


@app.command()
def e2e(
    shape: WholeShapeOption = None,
    model: RealOption = None,
    contexts: ContextsOption = "8K,32K",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the model. Default: the shape's.")] = None,
    batch: BatchOption = 1,
    fraction: CapOption = 0.05,
    own: Annotated[
        bool, typer.Option("--own-fraction", help="Use the method's default: short contexts are read in full.")
    ] = False,
    threads: ThreadsOption = None,
    methods: Annotated[
        str | None, typer.Option(help="infinigen, hf-sdpa-bf16, hf-eager-bf16 (fp32, fp16 by --dtype).")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Also measure another program, on the same GGUF file: llama.cpp.")
    ] = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = "none",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; slow methods run fewer.")] = 5,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Time whole decode steps of a random-weight or real model, and how the time grows with context.

    Caches are filled directly, without a prefill.

    [bold]Examples[/bold]

      farkv bench e2e

      farkv bench e2e --contexts 2K,32K --threads 1 --json

      farkv bench e2e --model ./my-model --contexts 8K --weights int8

      farkv bench e2e --model my-model.gguf --contexts 8K,32K --weights int8 --peer llama.cpp
    """
    set_threads(threads)
    peer_file = choose_peer(peer, model, batch)
    from farkv.bench.e2e import ModelSettings, draw_model, measure_model
    from farkv.bench.shapes import parse_contexts

    tokens = tuple(parse_contexts(contexts))
    whole = choose_whole(shape, model, layers, dtype or ("auto" if model else "bfloat16"), weights)
    settings = ModelSettings(
        whole.shape, tokens, whole.layers, split_names(methods, ()), batch=batch,
        fraction=None if own else fraction, rounds=rounds, dtype=whole.dtype, model=whole.model,
        weights=weights, peer_file=peer_file,
    )  # fmt: skip
    report = measure("e2e", partial(measure_model, settings), draw_model, as_json=as_json)
    finish(report, plot, as_json=as_json)


def calibrate_machine(threads: int | None, asked: tuple[str | None, str | None, str | None], *, as_json: bool) -> None:
    """Measure the context from which selecting records is faster than reading all, and save it for a shape and dtype.

    Args:
        asked: a shape's name, a model's, and a dtype's; None: the default ones.
    """
    set_threads(threads)
    from farkv.bench.calibrate import calibrate, draw_calibration

    shape = choose_shape(asked[0], asked[1], "llama3.2-1b")
    work = partial(calibrate, shape=shape, dtype=choose_dtype(asked[1], asked[2]))
    print_object(measure("calibrate", work, draw_calibration, as_json=as_json), as_json=as_json)


def set_threads(threads: int | None) -> None:
    """Set torch's thread count, which farkv's kernels also use."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def split_names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Split a comma-separated list of names."""
    return default if text is None else tuple(part.strip() for part in text.split(",") if part.strip())
