"""Public sets from files: RULER, LongBench v2, SCBench, PG-19; each becomes `Sample`s of the wanted lengths.

In: `SET:PATH`, a tokenizer, lengths in tokens. Out: samples, chosen by a seed. `longbench-v2:hub` and
`scbench:hub/NAME.jsonl` fetch the set's own file where a hub can be reached. A new set is one file and a line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from farkv.errors import ConfigError
from farkv.evals.public import longbench, pg19, ruler, scbench
from farkv.evals.public.choose import Wanted
from farkv.evals.sample import Sample

SETS = {"ruler": ruler.load, "longbench-v2": longbench.load, "scbench": scbench.load, "pg19": pg19.load}


def is_public(task: str) -> bool:
    """Return whether a task string names a public set, `SET:PATH`."""
    return task.partition(":")[0] in SETS


def load_public(
    spec: str, tokenizer: Any, lengths: Sequence[int], limit: int | None = None, seed: int = 0
) -> Iterator[Sample]:
    """Read the samples of a public set that fill more than half of a wanted length and fit it.

    Texts that are too long are refused; LongBench v2's are cut in their middle, as its own code does, and a book of
    PG-19 gives as much as is wanted. A sample's `seed` is its place among its task's records.

    Args:
        spec: `ruler:PATH`, `longbench-v2:PATH`, `scbench:PATH` or `pg19:PATH`; a file, or a folder of them.
        tokenizer: the model's own, with offsets (a fast one).
        lengths: tokens of text, longest question and answer together.
        limit: samples of each task and length; None: all.
        seed: decides which; a higher limit adds samples and keeps those of a lower one.

    Raises:
        ConfigError: there is no such set.
        InputError: a file is missing or not in the set's format, or none of a task's samples has a wanted length.
    """
    name, _, path = spec.partition(":")
    if name not in SETS or not path:
        raise ConfigError(f"task: expected SET:PATH with SET one of {', '.join(SETS)}, got {spec!r}")
    return SETS[name](path, Wanted(tokenizer, tuple(lengths), limit, seed))
