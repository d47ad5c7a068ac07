"""`farkv demo`: hide facts in code and ask for one of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from farkv.cli.options import DtypeOption, FractionOption, JsonOption
from farkv.cli.run import run
from farkv.cli.terminal import say
from farkv.files import write_file


def demo(
    tokens: Annotated[int, typer.Option(min=300, max=8000, help="Length of the text, in tokens.")] = 4000,
    facts: Annotated[int, typer.Option(min=1, max=500, help="Number of facts hidden in it.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the text.")] = 0,
    fraction: FractionOption = 0.1,
    near: Annotated[
        str | None,
        typer.Option(help="Limit of near memory. Default: about a sixth of the KV cache, so that records travel."),
    ] = None,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    r"""Hide facts in code that the demo model has not seen, and ask for one of them under a near limit.

    Writes the text to a temporary file, prints and runs the command, and says what it has shown.

    [bold]Examples[/bold]

      farkv demo

      farkv demo --tokens 8000 --facts 40 --seed 3

      farkv demo --near 2MiB --fraction 0.05
    """
    say(f"1/3 hiding {facts} facts in about {tokens:,} tokens of Python's own library, which the demo model never saw")
    from farkv.demo.explain import choose_near, explain_run
    from farkv.demo.text import draw_prompt

    prompt, near = draw_prompt(tokens, facts, seed), near or choose_near(tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.py"
        write_file(path, prompt.text.encode(), "text", private=True)
        lines = prompt.text.count("\n")
        said = f"{prompt.name} = {prompt.answer}"
        say(f"    {lines} lines; line {prompt.fact_line + 1} says: {said}")
        say("2/3 loading the model inside the package, reading the lines, asking: seconds, and the same as")
        dtype_flag = f"--dtype {dtype} " if dtype != "auto" else ""
        say(
            f"    $ farkv run --model demo --file code.py --fraction {fraction} --near {near} {dtype_flag}--verify 8 "
            f'--max-new-tokens 4 "{prompt.question}"'
        )
        receipt = run(
            prompt.question, model="demo", file=[path], fraction=fraction, near=near,
            max_new_tokens=4, verify=8, dtype=dtype, as_json=as_json,
        )  # fmt: skip
    say(f"3/3 expected: {prompt.answer}")
    for line in explain_run(prompt, receipt):
        say(line)
