"""`farkv profile`: measure a model once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from farkv.cli.interrupted import Interrupted
from farkv.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption
from farkv.cli.terminal import err, say
from farkv.cli.texts import read_text
from farkv.config import check_text
from farkv.errors import ConfigError, InputError
from farkv.names import check_target
from farkv.quote import quote, show_value
from farkv.show import show_phases

if TYPE_CHECKING:
    from farkv.calibrate.profile import Profile
    from farkv.math.importance import Scorer

# Tokenises a prompt: a text, or a text and a question about it.
Encode = Callable[[str, str | None], list[int]]
EXPECTED = 'expected an object with "prompt", or with "text" and "question"'


def profile_model(
    prompts: Annotated[
        list[Path] | None,
        typer.Option("--prompts", "-p", help="Text file, or .jsonl with one prompt per line; may be repeated."),
    ] = None,
    model: ModelOption = "demo",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the profile.")] = Path("profile.safetensors"),
    tokens: Annotated[int, typer.Option(min=16, help="Split texts into prompts of this many tokens.")] = 2048,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of prompts, spread over all the input.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the choice of prompts when there are more than --limit.")] = 0,
    scorer: Annotated[str, typer.Option(help="Scorer of the curves: window, expected or value.")] = "window",
    light: Annotated[bool, typer.Option("--light", help="Run half of the tokens: curves, no skew.")] = False,
    losses: Annotated[
        int,
        typer.Option(min=0, help="Also measure the loss of limiting each layer, on this many prompts (slow)."),
    ] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Measure a model once: every layer's skew and gain curves, in one file.

    The curves show how unevenly layers depend on their cache. Calibrate on
    prompts like those you will use, but not those you test on. An interrupted
    run leaves OUT.part; the same command resumes from it.

    Each line of a .jsonl file is {"prompt": ...} or {"text": ...,
    "question": ...}; these prompts are not split. --losses is needed for
    farkv plan --rule loss.

    [bold]Examples[/bold]

      farkv profile --model Qwen/Qwen3-8B --prompts book.txt --out qwen3.safetensors

      farkv profile -m Qwen/Qwen3-8B -p asked.jsonl --limit 64

      farkv profile --model demo -p a.py -p b.py --limit 8 --light

      farkv profile -m Qwen/Qwen3-8B -p asked.jsonl --losses 8
    """
    from farkv.hf.load import load_model, quiet_libraries
    from farkv.math.importance import SCORERS
    from farkv.measure.mini import Light
    from farkv.measure.profile import profile

    if scorer not in SCORERS:
        raise ConfigError(f"--scorer: expected one of {', '.join(SCORERS)}, got {scorer!r}")
    if not out.absolute().parent.is_dir():
        folder = quote(out.absolute().parent)
        raise InputError(f"--out {quote(out)}: the folder {folder} does not exist; create it first")
    try:
        check_target(out)
    except OSError as error:
        raise InputError(f"--out {quote(out)}: {error.strerror}; choose another name") from error
    files = [(path, read_prompts(path)) for path in prompts or []]
    if not any(found for _, found in files):
        raise InputError("--prompts: expected at least one file that contains text, got none")
    quiet_libraries()
    with show_phases(err, quiet=as_json) as phases:
        loaded, tokenizer = load_model(
            model, dtype=dtype, device=device, on_load=phases.begin("loading", in_bytes=True)
        )
    encode = partial(encode_prompt, tokenizer)
    rows = draw_rows([row for path, found in files for row in cut_rows(path, found, encode, tokens)], limit, seed)
    part, started = out.with_name(out.name + ".part"), time.perf_counter()
    work = partial(
        profile, loaded, rows, scorer=cast("Scorer", scorer), resume=part, light=Light() if light else None,
        losses=losses,
    )  # fmt: skip
    measured = measure(work, len(rows), part, as_json=as_json)
    measured.save(out)
    report(measured, out, {"tokens": sum(map(len, rows)), "prompts": len(rows)}, started, as_json=as_json)


def measure(work: Callable[..., Profile], n_rows: int, part: Path, *, as_json: bool) -> Profile:
    """Measure the prompts, and say how far that is.

    Args:
        part: where an unfinished measurement is kept, and one is resumed from.

    Raises:
        Interrupted: by Ctrl-C; what was measured is kept.
    """
    resumes, n_done = part.is_file(), 0
    with show_phases(err, quiet=as_json) as phases:
        show = phases.begin("measuring")
        show(0, n_rows)

        def on_prompt(done: int, total: int) -> None:
            nonlocal n_done
            if resumes and not n_done:
                say(f"resuming from {quote(part)}: {done} of {total} prompts are done")
            # Losses come after the prompts, and are measured again.
            n_done = min(done, n_rows)
            show(done, total)

        try:
            return work(on_prompt=on_prompt)
        except KeyboardInterrupt as stop:
            if not part.is_file():
                raise
            kept = f"{n_done} of {n_rows} prompts are kept in {quote(part)}"
            raise Interrupted(f"while measuring: {kept}; the same command goes on from there") from stop


def report(measured: Profile, out: Path, counts: dict[str, int], started: float, *, as_json: bool) -> None:
    """Print a summary of the profile: JSON on stdout, or a line on stderr."""
    n_curves = 0 if measured.measured is None else len(measured.measured)
    summary = {
        "out": str(out),
        "bytes": out.stat().st_size,
        "tensors": len(measured.tensors),
        **counts,
        "curves": n_curves,
        "skew": measured.has_skew,
        "seconds": round(time.perf_counter() - started, 3),
        **measured.identity,
    }
    if as_json:
        typer.echo(json.dumps(summary))
        return
    what = f"skew and curves of {n_curves} prompts"
    if not measured.has_skew:
        what = f"curves of {n_curves} prompts, no skew (it will be fitted to each prompt)"
    say(f"wrote {quote(out)} ({summary['bytes']:,} bytes): {what}")


def read_prompts(path: Path) -> list[tuple[str, str | None]]:
    """Read a file's prompts: (text, None), or (text, question).

    Raises:
        InputError: the file cannot be read, or a line of a .jsonl file is not a prompt.
    """
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [(text, None)] if text.strip() else []
    # Not splitlines: a JSON string may contain other line separators unescaped.
    lines = enumerate(text.split("\n"), start=1)
    return [read_line(f"{quote(path)}:{number}", line) for number, line in lines if line.strip()]


def read_line(where: str, line: str) -> tuple[str, str | None]:
    """Parse one line of a .jsonl file; `where` is its file and line number."""
    try:
        found: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno}); {EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits, thousands of brackets.
        raise InputError(f"{where}: not JSON of usual size ({error}); {EXPECTED}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: {EXPECTED}, got {type(found).__name__}")
    names = ("prompt",) if "prompt" in found else ("text", "question")
    values: list[Any] = [found.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            got = "missing" if value is None else "empty" if value == "" else show_value(value)
            raise InputError(f"{where}: {EXPECTED}, each a non-empty string; {name!r} is {got}")
        check_text(f"{where}: {name}", value)
    return values[0], values[1] if len(values) > 1 else None


def encode_prompt(tokenizer: Any, text: str, question: str | None) -> list[int]:
    """Tokenise a prompt; one with a question is formatted as in `farkv run`."""
    from farkv.hf.prompt import build_prompt

    if question is None:
        return tokenizer(text)["input_ids"]
    prompt = build_prompt(tokenizer, text, question)
    return prompt.text + prompt.question


def cut_rows(path: Path, found: list[tuple[str, str | None]], encode: Encode, size: int) -> list[list[int]]:
    """Tokenise a file's prompts; a plain text is split into runs of `size` tokens, dropping a short last one."""
    rows = [encode(text, question) for text, question in found]
    if path.suffix == ".jsonl" or not rows:
        return rows
    runs = [rows[0][i : i + size] for i in range(0, len(rows[0]), size)]
    return runs[:-1] if len(runs) > 1 and 2 * len(runs[-1]) < size else runs


def draw_rows(rows: list[list[int]], limit: int, seed: int) -> list[list[int]]:
    """Sample `limit` prompts in order: one at random from each of `limit` equal intervals."""
    if len(rows) <= limit:
        return rows
    rng, n = random.Random(seed), len(rows)
    return [rows[rng.randrange(i * n // limit, (i + 1) * n // limit)] for i in range(limit)]
