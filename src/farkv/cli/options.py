"""Code common to the commands: options, threads, printing a receipt."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from farkv.cli.terminal import err
from farkv.config import EVICT, KERNELS, QUANT, WEIGHTS
from farkv.errors import ConfigError
from farkv.show import draw_receipt

if TYPE_CHECKING:
    from farkv.receipt import Receipt

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


def print_receipt(receipt: Receipt, *, as_json: bool) -> None:
    """Print the receipt: JSON on stdout, or a table on stderr."""
    if as_json:
        typer.echo(json.dumps(receipt.to_dict()))
    else:
        err.print(draw_receipt(receipt))


def set_threads(threads: int | None) -> None:
    """Let torch and the kernels run on so many threads.

    Raises:
        ConfigError: they are more than the processors that this process may use: each would wait for another.
    """
    if threads is None:
        return
    most = len(os.sched_getaffinity(0))
    if not 1 <= threads <= most:
        raise ConfigError(f"--threads: expected 1 to {most}, the processors that farkv may use here, got {threads}")
    import torch

    torch.set_num_threads(threads)
