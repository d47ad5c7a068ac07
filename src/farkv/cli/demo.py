"""`farkv demo`: hide facts in code and ask for one of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import DtypeOption, FractionOption, JsonOption, NearOption
from farkv.cli.run import run
from farkv.cli.terminal import say
from farkv.files import write_file


def demo(
    tokens: Annotated[int, typer.Option(min=300, max=8000, help="Length of the text, in tokens.")] = 4000,
    facts: Annotated[int, typer.Option(min=1, max=500, help="Number of facts hidden in it.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the text.")] = 0,
    fraction: FractionOption = 0.1,
    near: NearOption = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Hide facts in code that the demo model has not seen, and ask for one of them.

    Writes the text to a temporary file, then prints and runs the command.

    [bold]Examples[/bold]

      farkv demo

      farkv demo --tokens 8000 --facts 40 --seed 3
    """
    from farkv.demo.text import draw_prompt

    prompt = draw_prompt(tokens, facts, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.py"
        write_file(path, prompt.text.encode(), "text", private=True)
        lines = prompt.text.count("\n")
        flags = (f"--near {near} " if near else "") + (f"--dtype {dtype} " if dtype != "auto" else "")
        said = f"{prompt.name} = {prompt.answer}"
        say(f"{lines} lines of code, {facts} facts; line {prompt.fact_line + 1} says: {said}")
        say(
            f"$ farkv run --model demo --file code.py --fraction {fraction} {flags}--verify 8 --max-new-tokens 4 "
            f'"{prompt.question}"'
        )
        run(
            prompt.question, model="demo", file=path, fraction=fraction, near=near,
            max_new_tokens=4, verify=8, dtype=dtype, as_json=as_json,
        )  # fmt: skip
    say(f"expected: {prompt.answer}")
