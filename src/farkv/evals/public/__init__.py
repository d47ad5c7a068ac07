"""Public data sets from files: RULER, LongBench v2, SCBench, PG-19, as `Sample`s of given lengths.

In: `SET:PATH`, a tokenizer, lengths in tokens. Out: samples, selected by a seed. `longbench-v2:hub` and
`scbench:hub/NAME.jsonl` download the set's file from the Hugging Face hub. A new set is one file and a line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from farkv.errors import ConfigError
from farkv.evals.public import longbench, pg19, ruler, scbench
from farkv.evals.public.choose import Wanted
from farkv.evals.sample import Sample

SETS = {"ruler": ruler.load, "longbench-v2": longbench.load, "scbench": scbench.load, "pg19": pg19.load}


def load_public(
    spec: str, tokenizer: Any, lengths: Sequence[int], limit: int | None = None, seed: int = 0
) -> Iterator[Sample]:
    """Read the samples of a public set that are longer than half of a given length and fit in it.

    Texts that are too long are skipped, except that LongBench v2's lose their middle, as in its own code, and a PG-19
    book gives a passage of the given length. A sample's `seed` is its index among its task's records.

    Args:
        spec: `ruler:PATH`, `longbench-v2:PATH`, `scbench:PATH` or `pg19:PATH`; a file, or a folder of them.
        tokenizer: the model's own, with offsets (a fast one).
        lengths: tokens of text, longest question and answer together.
        limit: samples per task and length; None: all.
        seed: selects the samples; those of a lower limit are a subset of those of a higher one.

    Raises:
        ConfigError: the set is unknown.
        InputError: a file is missing or not in the set's format, or none of a task's samples fits a given length.
    """
    name, _, path = spec.partition(":")
    if name not in SETS or not path:
        raise ConfigError(f"task: expected SET:PATH with SET one of {', '.join(SETS)}, got {spec!r}")
    return SETS[name](path, Wanted(tokenizer, tuple(lengths), limit, seed))
