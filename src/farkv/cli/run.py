"""`farkv run`: answer a question about a long text."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import (
    DeviceOption,
    DtypeOption,
    FractionOption,
    HostOption,
    JsonOption,
    ModelOption,
    NearOption,
    ProfileOption,
    TokensOption,
    VerifyOption,
    err,
    print_receipt,
    read_text,
)
from farkv.config import Full, InfiniGen, Method, Oracle, Random, Window, parse_bytes
from farkv.errors import ConfigError, InputError
from farkv.show import show_progress

METHODS = ("infinigen", "full", "window", "oracle", "random")


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
