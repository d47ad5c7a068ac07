"""Code common to the commands: options, reading text, printing a receipt."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farkv.cli.terminal import err
from farkv.config import EVICT, KERNELS, QUANT, WEIGHTS
from farkv.errors import InputError
from farkv.files import read_file
from farkv.names import RefusedError
from farkv.quote import quote
from farkv.show import draw_receipt

if TYPE_CHECKING:
    from farkv.receipt import Receipt

STREAM = re.compile(r"/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="demo, a folder, a GGUF file, or a Hugging Face hub id.")
]
FractionOption = Annotated[
    float | None, typer.Option(help="Hard cap on the KV bytes read per step, over all layers (default 0.1).")
]
NearOption = Annotated[
    str | None, typer.Option(help="Limit of near memory, e.g. 2GiB: GPU memory, or on a CPU a counted allocation.")
]
HostOption = Annotated[str | None, typer.Option(help="Limit of the host pool, e.g. 24GiB.")]
DiskOption = Annotated[
    str | None,
    typer.Option(help="Folder and limit, e.g. /data/kv:100GiB: stores records there, host memory caches pages."),
]
EvictOption = Annotated[
    str,
    typer.Option(
        help="Eviction policy of a full host pool: " + ", ".join(EVICT) + ". With --disk it only drops cached copies."
    ),
]
QuantOption = Annotated[
    str | None, typer.Option(help="Store records as " + " or ".join(QUANT) + " in host memory and on disk.")
]
KernelOption = Annotated[
    str,
    typer.Option(help=" or ".join(KERNELS) + ": fast kernels for selected records only, for all reads, or for none."),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of the answer.")]
VerifyOption = Annotated[int, typer.Option(min=0, help="Compare this many decode steps with full attention.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
ProfileOption = Annotated[
    str | None, typer.Option(help="Profile file, or none. Default: the one beside the model, if any.")
]
DtypeOption = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto: float32 where the CPU is slow in half.")
]
WeightsOption = Annotated[
    str,
    typer.Option(help=", ".join(WEIGHTS) + ": keep linear maps in 8 or 4 bits, on a CPU: faster, and less exact."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def read_text(file: Path | None) -> str:
    """Read the text from a file, or from standard input for `-` or a pipe; else it is empty.

    Raises:
        InputError: the file is missing, unreadable, or not UTF-8 text.
    """
    name = "stdin" if file is None or str(file) == "-" else quote(file)
    try:
        if file is None:
            # Piped input needs no flag; a terminal is not read.
            data = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
        elif str(file) == "-":
            data = b"" if sys.stdin is None else sys.stdin.buffer.read()
        else:
            data = read_stream(file) if STREAM.fullmatch(str(file)) else read_file(file)
    except OSError as error:
        raise InputError(f"file {name}: cannot be read ({error.strerror}); expected a text file") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {name}: not UTF-8 text (byte {error.start}); expected a text file") from error
    if "\0" in text:
        raise InputError(f"file {name}: contains NUL bytes; expected a text file")
    return text


def read_stream(file: Path) -> bytes:
    """Read what the caller has opened for this process: `/dev/stdin`, or `<(command)` of a shell.

    A pipe by any other name has a writer perhaps, and perhaps not; a device may never end.
    """
    with file.open("rb") as opened:
        if stat.S_ISCHR(os.fstat(opened.fileno()).st_mode) and not opened.isatty():
            raise RefusedError("is a device, expected a file or a pipe")
        return opened.read()


def print_receipt(receipt: Receipt, *, as_json: bool) -> None:
    """Print the receipt: JSON on stdout, or a table on stderr."""
    if as_json:
        typer.echo(json.dumps(receipt.to_dict()))
    else:
        err.print(draw_receipt(receipt))
