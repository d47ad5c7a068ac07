"""`farkv profile`: measure a model once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, err, read_text
from farkv.errors import InputError
from farkv.show import show_progress


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
