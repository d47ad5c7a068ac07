"""`farkv run`: answer a question about a long text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from farkv.cli.method import Ask, check_exact, make_methods
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
    VerifyOption,
    WeightsOption,
    set_threads,
)
from farkv.cli.respond import respond
from farkv.cli.session import Request, check_session
from farkv.cli.terminal import err
from farkv.cli.texts import read_texts
from farkv.config import (
    KERNELS,
    WEIGHTS,
    check_name,
    check_sampling,
    check_storage,
    check_text,
    parse_bytes,
    parse_disk,
)
from farkv.errors import ConfigError, InputError
from farkv.methods import METHODS
from farkv.receipt import Receipt
from farkv.show import show_phases

# Tokens of the demo model's answer: it knows no end of one.
DEMO_TOKENS = 64


def run(
    question: Annotated[str, typer.Argument(help="Question about the text; without one, the text is continued.")] = "",
    model: ModelOption = "demo",
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "-f", help="Text, PDF or HTML file; - or a pipe reads stdin; several are read in order."
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Read HTML as it is, markup included.")] = False,
    system: Annotated[str, typer.Option(help="System message, through the model's chat template.")] = "",
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
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum length of the answer.", show_default=f"256; of the demo model {DEMO_TOKENS}"),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens that hold this share; with --temperature. "
            "Default: the model's generation config."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from so many of the likeliest tokens; with --temperature.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer after this text; may be repeated.")] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Full attention's own answer: sparse steps only draft it; --fraction is speed."),
    ] = False,
    verify: VerifyOption = 0,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "none",
    device: DeviceOption = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Threads, at most one per processor. Default: torch's setting.")
    ] = None,
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

      farkv run -m ./my-model -f book.txt --host 2GiB --disk /data/kv:100GiB --exact "Who wrote the letter?"

      cat notes.txt | farkv run -m ./my-model --verify 8 --json "What was decided?"
    """
    # Check everything that needs no model before loading one.
    configs = make_methods(Ask(method, fraction, paper, retention, plan, tuple(lever or ())))
    limits = parse_bytes(near, "--near"), parse_bytes(host, "--host")
    parse_disk(disk, "--disk")
    check_storage(evict, quant, host=limits[1])
    check_name("kernel", kernel, KERNELS)
    check_name("weights", weights, WEIGHTS)
    check_sampling(temperature, top_p, top_k, "--")
    check_text("question", question)
    check_text("--system", system)
    check_text("--stop", *(stop or ()))
    set_threads(threads)
    check_exact(configs, exact=exact, verify=verify, evict=evict)
    if query_aware and session is not None:
        raise ConfigError("--query-aware: cannot be combined with --session, which stores the text only; drop one")
    text = read_texts(file, raw=raw, quiet=as_json)
    if session is not None:
        check_session(session, text, configs, evicts_pool=evict != "refuse" and disk is None)
    elif not (text + question).strip():
        raise InputError("prompt: text and question are both empty; give --file, a question, or both")
    import torch

    from farkv.hf.ask import NEW_TOKENS, Decoding
    from farkv.hf.attach import attach
    from farkv.hf.load import load_model, quiet_libraries

    quiet_libraries()
    torch.manual_seed(seed)
    storage: dict[str, Any] = {"near": limits[0], "host": limits[1], "disk": disk, "evict": evict, "quant": quant}
    measured = False if profile == "none" else profile
    with show_phases(err, quiet=as_json) as phases:
        loaded, tokenizer = load_model(
            model, dtype=dtype, device=device, weights=weights, on_load=phases.begin("loading", in_bytes=True)
        )
        phases.begin("checking the model")(0, None)
        far = attach(loaded, *configs, **storage, kernel=kernel, profile=measured, plan=plan)
    most = max_new_tokens or (DEMO_TOKENS if model == "demo" else NEW_TOKENS)
    decoding = Decoding(most, temperature, tuple(stop or ()), chunk_tokens, top_p, top_k, exact)
    with far:
        request = Request(model, far, tokenizer, text, question, system, decoding, verify)
        return respond(request, session, query_aware=query_aware, as_json=as_json)
