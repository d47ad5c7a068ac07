"""`farkv run`: answer a question about a long text."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from farkv.cli.options import (
    DeviceOption,
    DiskOption,
    DtypeOption,
    EvictOption,
    FractionOption,
    HostOption,
    JsonOption,
    KernelOption,
    ModelOption,
    NearOption,
    ProfileOption,
    QuantOption,
    TokensOption,
    VerifyOption,
    err,
    print_receipt,
    read_text,
)
from farkv.config import (
    H2O,
    KERNELS,
    LEVERS,
    XKV,
    Evictor,
    Full,
    InfiniGen,
    Lever,
    LowBit,
    Method,
    Oracle,
    Pages,
    PyramidKV,
    Random,
    SnapKV,
    Window,
    check_name,
    check_storage,
    format_bytes,
    parse_bytes,
    parse_disk,
)
from farkv.errors import ConfigError, InputError
from farkv.show import show_progress

if TYPE_CHECKING:
    from farkv.hf.ask import Decoding
    from farkv.hf.cache import FarCache
    from farkv.hf.handle import Handle

METHODS = ("infinigen", "xkv", "full", "window", "oracle", "random", "h2o", "snapkv", "pyramidkv", "pages", "lowbit")


class Ask(NamedTuple):
    """What the command line says about the method."""

    name: str
    fraction: float | None = None
    paper: bool = False
    retention: float | None = None
    plan: Path | None = None
    levers: tuple[str, ...] = ()


def make_methods(asked: Ask) -> list[Method]:
    """Return the methods' configs from their name on the command line: a selector, XKV, or XKV beside a selector."""
    name, fraction = asked.name, asked.fraction
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    if asked.paper and name not in ("infinigen", "xkv"):
        raise ConfigError(f"--paper: belongs to --method infinigen or xkv, got --method {name}")
    if asked.retention is not None and name != "xkv":
        raise ConfigError(f"--retention: belongs to --method xkv, got --method {name}")
    if asked.levers and asked.plan is None:
        raise ConfigError("--lever: says what a plan drives; give one with --plan")
    for lever in asked.levers:
        if lever not in LEVERS:
            raise ConfigError(f"--lever: expected one of {', '.join(LEVERS)}, got {lever!r}")
    levers: tuple[Lever, ...] = tuple(lever for lever in LEVERS if lever in asked.levers)
    if name == "xkv":
        retention = asked.retention
        return [XKV(fraction=fraction, retention=retention, paper=asked.paper, levers=levers or ("keep",))]
    xkv: list[Method] = [XKV(levers=levers)] if levers else []
    if name == "infinigen":
        return [InfiniGen(fraction=fraction, paper=asked.paper), *xkv]
    if name == "full":
        return [Full(fraction=1.0 if fraction is None else fraction), *xkv]
    rivals = {"h2o": H2O, "snapkv": SnapKV, "pyramidkv": PyramidKV, "pages": Pages, "lowbit": LowBit}
    maker = {"window": Window, "oracle": Oracle, "random": Random, **rivals}[name]
    return [maker() if fraction is None else maker(fraction=fraction), *xkv]


def run(
    question: Annotated[str, typer.Argument(help="Asked about the text; left out, the text is continued.")] = "",
    model: ModelOption = "demo",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The text; - or a pipe is stdin.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="Session file: written with the text's records if missing, else asked.")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")] = "infinigen",
    fraction: FractionOption = None,
    paper: Annotated[bool, typer.Option("--paper", help="infinigen or xkv as published.")] = False,
    retention: Annotated[
        float | None, typer.Option(help="xkv: keep as little as holds this share of the attention mass.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file: what each layer may keep, hold near, fetch.")] = None,
    lever: Annotated[
        list[str] | None,
        typer.Option(help="What of the plan is used; may be repeated (default: keep for xkv, else fetch)."),
    ] = None,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Read the question with the text, so that eviction knows it.")
    ] = False,
    near: NearOption = None,
    host: HostOption = None,
    disk: DiskOption = None,
    evict: EvictOption = "refuse",
    quant: QuantOption = None,
    kernel: KernelOption = "auto",
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the text read at once (default: 2048, or what fits).")
    ] = None,
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

      farkv run -m Qwen/Qwen3-8B -f book.txt --host 8GiB --disk /data/kv:100GiB "Who wrote the letter?"

      farkv run -m ./my-model -f book.txt --session book.farkv "Who wrote the letter?"

      farkv run -m ./my-model --session book.farkv "And to whom?"

      farkv run -m demo -f code.py --method xkv --fraction 0.3 --query-aware "print(apple_river)  # "

      cat notes.txt | farkv run -m ./my-model --verify 8 --json "What was decided?"
    """
    # What can be checked without a model is checked before one is loaded.
    configs = make_methods(Ask(method, fraction, paper, retention, plan, tuple(lever or ())))
    limits = parse_bytes(near, "--near"), parse_bytes(host, "--host")
    parse_disk(disk, "--disk")
    check_storage(evict, quant, host=limits[1])
    check_name("kernel", kernel, KERNELS)
    if query_aware and session is not None:
        raise ConfigError("--query-aware: a session holds the text only; leave one of them out")
    text = read_text(file)
    if session is not None:
        check_session(session, text, configs, spills=evict != "refuse" and disk is None)
    elif not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file with text, or a question")
    import torch

    from farkv.hf.ask import Decoding, Listener, answer, prefill
    from farkv.hf.attach import attach
    from farkv.hf.load import load_model, quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    with err.status(f"loading {model}") if err.is_terminal else nullcontext():
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    storage: dict[str, Any] = {"near": limits[0], "host": limits[1], "disk": disk, "evict": evict, "quant": quant}
    measured = False if profile == "none" else profile
    decoding = Decoding(max_new_tokens, temperature, tuple(stop or ()), chunk_tokens)
    with attach(loaded, *configs, **storage, kernel=kernel, profile=measured, plan=plan) as far:
        job = Job(far, tokenizer, text, question, decoding, verify)
        with show_progress(err, "reading", quiet=as_json) as on_prefill:
            listener = Listener(on_prefill, (lambda piece: None) if as_json else _write)
            prompt, cache = open_session(job, session, listener) if session else open_text(job, query_aware=query_aware)
            prefill(far, cache, prompt.text[cache.get_seq_length() :], chunk_tokens, listener)
        # The bar is gone: while it lives it takes stdout for itself, and breaks the line after every piece.
        said = answer(far, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)
        receipt = dataclasses.replace(far.receipt(cache), model=model, answer=said)
    if not as_json:
        typer.echo()
    print_receipt(receipt, as_json=as_json)


def check_session(path: Path, text: str, methods: list[Method], *, spills: bool) -> None:
    """Refuse a session that can be neither asked nor written, before anything is loaded."""
    if any(isinstance(method, Evictor) for method in methods):
        raise ConfigError("--session: holds the whole text, and this method evicts some of it; leave one of them out")
    if any(isinstance(method, XKV) and {"keep", "near"} & set(method.levers) for method in methods):
        raise ConfigError(
            "--session: holds the whole text, and XKV's levers keep and near do not; leave one of them out"
        )
    try:
        if path.exists():
            return
        is_writable = path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"--session {path}: cannot be reached ({error.strerror}); choose another folder") from error
    if not text.strip():
        raise InputError(f"--session {path}: there is no such file; give --file with the text to write it")
    if not is_writable:
        raise InputError(f"--session {path}: expected a folder that can be written; make it, or choose another one")
    if spills:
        raise ConfigError("--evict: what is evicted cannot be saved in a session; give --disk, or leave evict out")


class Job(NamedTuple):
    """A text, a question, and what answers it."""

    far: Handle
    tokenizer: Any
    text: str
    question: str
    decoding: Decoding
    verify: int


def open_text(job: Job, *, query_aware: bool) -> tuple[Any, FarCache]:
    """Return the prompt and an empty cache that has room for it."""
    from farkv.hf.ask import build_prompt
    from farkv.hf.handle import CHUNK_TOKENS

    prompt = build_prompt(job.tokenizer, job.text, job.question)
    if query_aware:
        prompt = prompt.read_question()
    tokens = prompt.n_tokens + job.decoding.max_new_tokens
    chunk = job.decoding.chunk_tokens or CHUNK_TOKENS
    return prompt, job.far.new_cache(tokens=tokens, verify=job.verify, chunk_tokens=chunk)


def open_session(job: Job, path: Path, listener: Any) -> tuple[Any, FarCache]:
    """Return the prompt and a cache over the session's file, which is written first if it is not there."""
    from farkv.hf.ask import build_prompt, prefill
    from farkv.hf.session import load_cache, read_session_text, resume

    if not path.exists():
        prompt, cache = open_text(job._replace(verify=0), query_aware=False)
        prefill(job.far, cache, prompt.text, job.decoding.chunk_tokens, listener)
        cache.save(path, tokenizer=job.tokenizer, text=job.text)
        err.print(f"session {path}: {format_bytes(path.stat().st_size)} for {len(prompt.text)} tokens")
        cache.reset()
    # The first question takes the same way as all later ones: from the file.
    prompt = build_prompt(job.tokenizer, read_session_text(path, job.text), job.question)
    tokens = prompt.n_tokens + job.decoding.max_new_tokens
    cache = load_cache(path, job.far.model, tokens=tokens, verify=job.verify, tokenizer=job.tokenizer)
    resume(cache, prompt.text)
    return prompt, cache


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
