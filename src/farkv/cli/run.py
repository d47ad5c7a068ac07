"""`farkv run`: answer a question about a long text."""

from __future__ import annotations

import dataclasses
import os
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
    WeightsOption,
    print_receipt,
    read_text,
)
from farkv.cli.terminal import err, say, show_waiting, write_answer
from farkv.config import (
    KERNELS,
    LEVERS,
    WEIGHTS,
    Lever,
    check_name,
    check_storage,
    check_temperature,
    check_text,
    format_bytes,
    parse_bytes,
    parse_disk,
)
from farkv.errors import ConfigError, InputError
from farkv.methods import METHODS, XKV, Method
from farkv.methods.table import evicts
from farkv.names import check_target
from farkv.quote import quote
from farkv.receipt import Receipt
from farkv.show import show_progress

if TYPE_CHECKING:
    from farkv.hf.ask import Decoding
    from farkv.hf.cache import FarCache
    from farkv.hf.handle import Handle


class Ask(NamedTuple):
    """The command-line options that choose the method."""

    name: str
    fraction: float | None = None
    paper: bool = False
    retention: float | None = None
    plan: Path | None = None
    levers: tuple[str, ...] = ()


def make_methods(asked: Ask) -> list[Method]:
    """Return the configs of the named method: a selector, XKV, or a selector with XKV for the plan's levers."""
    name, fraction = asked.name, asked.fraction
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    if asked.paper and name not in ("infinigen", "xkv"):
        raise ConfigError(f"--paper: requires --method infinigen or xkv, got --method {name}")
    if asked.retention is not None and name != "xkv":
        raise ConfigError(f"--retention: requires --method xkv, got --method {name}")
    if asked.levers and asked.plan is None:
        raise ConfigError("--lever: selects levers of a plan, and there is no plan; add --plan")
    for lever in asked.levers:
        if lever not in LEVERS:
            raise ConfigError(f"--lever: expected one of {', '.join(LEVERS)}, got {lever!r}")
    levers: tuple[Lever, ...] = tuple(lever for lever in LEVERS if lever in asked.levers)
    if name == "xkv":
        retention = asked.retention
        return [XKV(fraction=fraction, retention=retention, paper=asked.paper, levers=levers or ("keep",))]
    options: dict[str, Any] = {} if fraction is None else {"fraction": fraction}
    if name == "infinigen":
        options["paper"] = asked.paper
    xkv: list[Method] = [XKV(levers=levers)] if levers else []
    return [METHODS[name].config(**options), *xkv]


def run(
    question: Annotated[str, typer.Argument(help="Question about the text; without one, the text is continued.")] = "",
    model: ModelOption = "demo",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text file; - or a pipe reads stdin.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="Session file: created from the text if it does not exist, else reused.")
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + ".")] = "infinigen",
    fraction: FractionOption = None,
    paper: Annotated[bool, typer.Option("--paper", help="infinigen or xkv as published.")] = False,
    retention: Annotated[
        float | None, typer.Option(help="xkv: keep the fewest records that retain this fraction of attention mass.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file: what each layer may keep, hold near, fetch.")] = None,
    lever: Annotated[
        list[str] | None,
        typer.Option(help="Lever of the plan to use; may be repeated (default: keep for xkv, else fetch)."),
    ] = None,
    query_aware: Annotated[
        bool, typer.Option("--query-aware", help="Prefill the question with the text, so that eviction sees it.")
    ] = False,
    near: NearOption = None,
    host: HostOption = None,
    disk: DiskOption = None,
    evict: EvictOption = "refuse",
    quant: QuantOption = None,
    kernel: KernelOption = "auto",
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prefill chunk size in tokens (default: 2048, or what fits).")
    ] = None,
    profile: ProfileOption = None,
    max_new_tokens: TokensOption = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    verify: VerifyOption = 0,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "none",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> Receipt:
    r"""Answer a question about a long text, with a KV cache in far memory.

    [bold]Examples[/bold]

      farkv run --model demo --file code.py "print(apple_river)  # " --max-new-tokens 4

      farkv run -m Qwen/Qwen3-8B -f book.txt --near 2GiB --host 24GiB "Who wrote the letter?"

      farkv run -m Qwen/Qwen3-8B -f book.txt --host 8GiB --disk /data/kv:100GiB "Who wrote the letter?"

      farkv run -m qwen2.5-1.5b-q4_k_m.gguf --weights int8 -f book.txt "Who wrote the letter?"

      farkv run -m ./my-model -f book.txt --session book.farkv "Who wrote the letter?"

      farkv run -m ./my-model --session book.farkv "And to whom?"

      farkv run -m demo -f code.py --method xkv --fraction 0.3 --query-aware "print(apple_river)  # "

      cat notes.txt | farkv run -m ./my-model --verify 8 --json "What was decided?"
    """
    # Check everything that needs no model before loading one.
    configs = make_methods(Ask(method, fraction, paper, retention, plan, tuple(lever or ())))
    limits = parse_bytes(near, "--near"), parse_bytes(host, "--host")
    parse_disk(disk, "--disk")
    check_storage(evict, quant, host=limits[1])
    check_name("kernel", kernel, KERNELS)
    check_name("weights", weights, WEIGHTS)
    check_temperature(temperature, "--temperature")
    check_text("question", question)
    check_text("--stop", *(stop or ()))
    if query_aware and session is not None:
        raise ConfigError("--query-aware: cannot be combined with --session, which stores the text only; drop one")
    text = read_text(file)
    if session is not None:
        check_session(session, text, configs, evicts_pool=evict != "refuse" and disk is None)
    elif not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file, a question, or both")
    import torch

    from farkv.hf.ask import Decoding, Listener, answer, prefill
    from farkv.hf.attach import attach
    from farkv.hf.load import load_model, quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    with show_waiting(f"loading {quote(model)}"):
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, weights=weights)
    storage: dict[str, Any] = {"near": limits[0], "host": limits[1], "disk": disk, "evict": evict, "quant": quant}
    measured = False if profile == "none" else profile
    decoding = Decoding(max_new_tokens, temperature, tuple(stop or ()), chunk_tokens)
    with attach(loaded, *configs, **storage, kernel=kernel, profile=measured, plan=plan) as far:
        request = Request(far, tokenizer, text, question, decoding, verify)
        with show_progress(err, "reading", quiet=as_json) as on_prefill:
            listener = Listener(on_prefill, (lambda piece: None) if as_json else write_answer)
            if session:
                prompt, cache = open_session(request, session, listener)
            else:
                prompt, cache = open_text(request, query_aware=query_aware)
            if note := far.find_least(prompt.n_tokens).note:
                err.print(note, highlight=False)
            prefill(far, cache, prompt.text[cache.get_seq_length() :], chunk_tokens, listener)
        # Only after the progress bar has stopped: while active it redirects stdout and ends the line after every write.
        text_out = answer(far, tokenizer, prompt, cache=cache, decoding=decoding, listener=listener)
        receipt = dataclasses.replace(far.receipt(cache), model=model, answer=text_out)
    if not as_json:
        typer.echo()
    # The demo's answers are four digits: as many tokens are asked for.
    if cache.account.is_cut and not as_json and model != "demo":
        err.print(f"the answer was cut after {max_new_tokens} tokens; --max-new-tokens sets how many there may be")
    print_receipt(receipt, as_json=as_json)
    return receipt


def check_session(path: Path, text: str, methods: list[Method], *, evicts_pool: bool) -> None:
    """Refuse a session that can be neither read nor written, before the model is loaded.

    Args:
        evicts_pool: a full host pool loses records.
    """
    if any(evicts(method) and not isinstance(method, XKV) for method in methods):
        raise ConfigError("--session: stores the whole text, but this method evicts part of it; drop one of them")
    if any(isinstance(method, XKV) and {"keep", "near"} & set(method.levers) for method in methods):
        raise ConfigError("--session: stores the whole text, but XKV's levers keep and near do not; drop one of them")
    shown = quote(path)
    try:
        if path.exists():
            return
        check_target(path)
        is_writable = path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        is_writable = False
    except OSError as error:
        raise InputError(f"--session {shown}: cannot be used ({error.strerror}); choose another name") from error
    if not text.strip():
        raise InputError(f"--session {shown}: there is no such file; to create it, give the text with --file")
    if not is_writable:
        raise InputError(f"--session {shown}: the folder is missing or not writable; create it, or choose another one")
    if evicts_pool:
        raise ConfigError("--evict: evicted records cannot be saved in a session; add --disk, or drop --evict")


class Request(NamedTuple):
    """A text, a question, and the handle and options to answer it with."""

    far: Handle
    tokenizer: Any
    text: str
    question: str
    decoding: Decoding
    verify: int


def open_text(request: Request, *, query_aware: bool) -> tuple[Any, FarCache]:
    """Return the prompt and an empty cache with room for it."""
    from farkv.hf.ask import build_prompt
    from farkv.hf.handle import CHUNK_TOKENS

    prompt = build_prompt(request.tokenizer, request.text, request.question)
    if query_aware:
        prompt = prompt.read_question()
    tokens = prompt.n_tokens + request.decoding.max_new_tokens
    chunk = request.decoding.chunk_tokens or CHUNK_TOKENS
    return prompt, request.far.new_cache(tokens=tokens, verify=request.verify, chunk_tokens=chunk)


def open_session(request: Request, path: Path, listener: Any) -> tuple[Any, FarCache]:
    """Return the prompt and a cache over the session file, which is created first if it does not exist."""
    from farkv.hf.ask import build_prompt, prefill
    from farkv.hf.session import load_cache, read_session_text, resume

    if not path.exists():
        prompt, cache = open_text(request._replace(verify=0), query_aware=False)
        prefill(request.far, cache, prompt.text, request.decoding.chunk_tokens, listener, marks=True)
        cache.save(path, tokenizer=request.tokenizer, text=request.text)
        say(f"session {quote(path)}: {format_bytes(path.stat().st_size)} for {len(prompt.text)} tokens")
        cache.reset()
    # The first question also reads from the file, like all later ones.
    prompt = build_prompt(request.tokenizer, read_session_text(path, request.text), request.question)
    tokens = prompt.n_tokens + request.decoding.max_new_tokens
    cache = load_cache(path, request.far.model, tokens=tokens, verify=request.verify, tokenizer=request.tokenizer)
    resume(cache, prompt.text)
    return prompt, cache
