"""The command line: `farkv run`, `farkv profile`, `farkv demo`.

In: arguments. Out: the answer (or one JSON object) on stdout, all else on stderr. A mistake of the caller's is one
line and exit code 2.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from farkv.config import Full, InfiniGen, Method, Oracle, Random, Window, parse_bytes
from farkv.errors import ConfigError, FarKVError, InputError
from farkv.show import draw_receipt, show_progress

if TYPE_CHECKING:
    from farkv.receipt import Receipt

app = typer.Typer(
    name="farkv",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Run the context that your memory cannot hold, under hard byte limits, with a receipt.",
)
err = Console(stderr=True)

METHODS = ("infinigen", "full", "window", "oracle", "random")

ModelOption = Annotated[str, typer.Option("--model", "-m", help="demo, a folder, or a hub id.")]
FractionOption = Annotated[
    float | None, typer.Option(help="Hard cap on the KV bytes read per step, over all layers (default 0.1).")
]
NearOption = Annotated[
    str | None, typer.Option(help="Limit of near memory, e.g. 2GiB: a GPU's, or on a CPU a counted allocation.")
]
HostOption = Annotated[str | None, typer.Option(help="Limit of the host pool, e.g. 24GiB.")]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
VerifyOption = Annotated[int, typer.Option(min=0, help="Compare this many decode steps with full attention.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout: the receipt.")]
ProfileOption = Annotated[
    str | None, typer.Option(help="Profile file, or none. Default: profile.safetensors beside the model, if any.")
]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def show_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        typer.echo(f"farkv {version('farkv')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options before the command."""


def make_method(name: str, fraction: float | None, *, paper: bool = False) -> Method:
    """Return the method's config from its name on the command line."""
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    if paper and name != "infinigen":
        raise ConfigError(f"--paper: belongs to --method infinigen, got --method {name}")
    if name == "infinigen":
        return InfiniGen(fraction=fraction, paper=paper)
    if name == "full":
        return Full(fraction=1.0 if fraction is None else fraction)
    maker = {"window": Window, "oracle": Oracle, "random": Random}[name]
    return maker() if fraction is None else maker(fraction=fraction)


def read_text(file: Path | None) -> str:
    """Read the text from a file, from standard input for `-`, or nothing.

    Raises:
        InputError: the file is missing, unreadable, or not UTF-8 text.
    """
    if file is None:
        # Text that is piped in needs no flag; a terminal has none to give.
        data = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
        name = "stdin"
    elif str(file) == "-":
        data, name = sys.stdin.buffer.read(), "stdin"
    else:
        name = str(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"file {name}: cannot be read ({error.strerror}); expected a text file") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {name}: not UTF-8 text (byte {error.start}); expected a text file") from error
    if "\0" in text:
        raise InputError(f"file {name}: holds NUL bytes, so it is not text; expected a text file")
    return text


def print_receipt(receipt: Receipt, *, as_json: bool) -> None:
    """Print the receipt: JSON on stdout, or a table on stderr."""
    if as_json:
        typer.echo(json.dumps(receipt.to_dict()))
    else:
        err.print(draw_receipt(receipt))


@app.command()
def run(
    question: Annotated[str, typer.Argument(help="Asked about the text; left out, the text is continued.")] = "",
    model: ModelOption = "demo",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The text; - or a pipe is stdin.")] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")] = "infinigen",
    fraction: FractionOption = None,
    paper: Annotated[bool, typer.Option("--paper", help="InfiniGen as published.")] = False,
    near: NearOption = None,
    host: HostOption = None,
    profile: ProfileOption = None,
    max_new_tokens: TokensOption = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; may be repeated.")] = None,
    verify: VerifyOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Answer a question about a long text from a far KV cache.

    [bold]Examples[/bold]

      farkv run --model demo --file code.py "print(apple_river)  # " --max-new-tokens 4

      farkv run -m Qwen/Qwen3-8B -f book.txt --near 2GiB --host 24GiB "Who wrote the letter?"

      cat notes.txt | farkv run -m ./my-model --verify 8 --json "What was decided?"
    """
    # What can be checked without a model is checked before one is loaded.
    config = make_method(method, fraction, paper=paper)
    limits = {"near": parse_bytes(near, "--near"), "host": parse_bytes(host, "--host")}
    text = read_text(file)
    if not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file with text, or a question")
    import dataclasses

    import torch

    from farkv.hf.ask import Decoding, Listener, ask, build_prompt
    from farkv.hf.attach import attach
    from farkv.hf.load import load_model, quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    with err.status(f"loading {model}") if err.is_terminal else nullcontext():
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    prompt = build_prompt(tokenizer, text, question)
    with attach(loaded, config, profile=False if profile == "none" else profile, **limits) as far:
        cache = far.new_cache(tokens=prompt.n_tokens + max_new_tokens, verify=verify)
        with show_progress(err, "reading", quiet=as_json) as on_prefill:
            write = (lambda piece: None) if as_json else _write
            decoding = Decoding(max_new_tokens, temperature, tuple(stop or ()))
            answer = ask(far, tokenizer, prompt, cache=cache, decoding=decoding, listener=Listener(on_prefill, write))
        receipt = dataclasses.replace(far.receipt(cache), model=model, answer=answer)
    if not as_json:
        typer.echo()
    print_receipt(receipt, as_json=as_json)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@app.command(name="profile")
def profile_model(
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", "-p", help="Text files to calibrate on; may be repeated.")
    ] = None,
    model: ModelOption = "demo",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")] = Path("profile.safetensors"),
    tokens: Annotated[int, typer.Option(min=16, help="Tokens per prompt.")] = 2048,
    limit: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 16,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Measure a model once: the skew of every layer, written to a profile file.

    Calibrate on text like what you will ask about, and unlike what you test on.

    [bold]Examples[/bold]

      farkv profile --model Qwen/Qwen3-8B --prompts book.txt --out qwen3.safetensors

      farkv profile --model demo --prompts a.py --prompts b.py --limit 8
    """
    from farkv.hf.load import load_model, quiet_libraries
    from farkv.hf.measure import profile

    texts = [read_text(path) for path in prompts or []]
    if not any(text.strip() for text in texts):
        raise InputError("--prompts: expected at least one text file with text in it, got none")
    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    rows: list[list[int]] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        rows += [ids[i : i + tokens] for i in range(0, len(ids), tokens)]
    # Of a long text, runs from all over it.
    stride = max(1, len(rows) // limit)
    with show_progress(err, "measuring", quiet=as_json) as on_prompt:
        measured = profile(loaded, rows[::stride][:limit], on_prompt=on_prompt)
    measured.save(out)
    summary = {"out": str(out), "bytes": out.stat().st_size, "tensors": len(measured.tensors), **measured.identity}
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        err.print(f"wrote {out} ({summary['bytes']:,} bytes)")


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=300, max=8000, help="Length of the text, in tokens.")] = 4000,
    facts: Annotated[int, typer.Option(min=1, help="Facts scattered in it.")] = 30,
    seed: Annotated[int, typer.Option(help="Which text.")] = 0,
    fraction: FractionOption = 0.1,
    near: NearOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Hide facts in code that the demo model never saw, and ask for one of them.

    Writes the text to a temporary file, prints the command and runs it.

    [bold]Examples[/bold]

      farkv demo

      farkv demo --tokens 8000 --facts 40 --seed 3
    """
    from tokenizers import Tokenizer

    from farkv.demo import MODEL_PATH
    from farkv.demo.filler import STDLIB, draw_filler, read_sources
    from farkv.demo.recall import make_recall_prompt

    sources = read_sources(STDLIB, held_out=True)
    tokenizer = Tokenizer.from_file(str(MODEL_PATH / "tokenizer.json"))
    room = max(20, tokens - 14 * facts - 20)  # A fact's line takes about 14 tokens.
    filler = draw_filler(sources, room, seed, lambda line: len(tokenizer.encode(line).ids))
    prompt = make_recall_prompt(filler, facts, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.py"
        path.write_text(prompt.text)
        lines = prompt.text.count("\n")
        flags = f"--near {near} " if near else ""
        err.print(
            f"{lines} lines of code, {facts} facts; line {prompt.fact_line + 1} says: {prompt.name} = {prompt.answer}",
            highlight=False,
        )
        err.print(
            f"$ farkv run --model demo --file code.py --fraction {fraction} {flags}--verify 8 --max-new-tokens 4 "
            f'"{prompt.question}"\n',
            highlight=False,
            soft_wrap=True,
        )
        run(
            prompt.question, model="demo", file=path, fraction=fraction, near=near,
            max_new_tokens=4, verify=8, as_json=as_json,
        )  # fmt: skip
    err.print(f"expected: {prompt.answer}", highlight=False)


def main() -> None:
    """Run the command line; a FarKVError becomes one line and exit code 2."""
    try:
        app()
    except FarKVError as error:
        sys.stderr.write(f"farkv: {error}\n")
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away, for example `| head`.
        sys.exit(1)


if __name__ == "__main__":
    main()
