"""The tasks in plain words, one file each: RULER's thirteen by its names, and four more.

A task draws its own lines and turns; `farkv.evals.text` adds filler. Sentences and numbers are ours, shapes are RULER's
(Hsieh et al., 2024, arXiv 2404.06654, appendix B); docs/evaluation.md says what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from farkv.evals.draw import Draw
from farkv.evals.sample import Made
from farkv.evals.tasks import extraction, longgen, niah, orders, qa, vt, words

TASKS: dict[str, Callable[[Draw], Made]] = {
    "niah_single_1": partial(niah.make_single, haystack="noise"),
    "niah_single_2": niah.make_single,
    "niah_single_3": partial(niah.make_single, value="uuid"),
    "niah_multikey_1": niah.make_multikey,
    "niah_multikey_2": partial(niah.make_multikey, haystack="needles"),
    "niah_multikey_3": partial(niah.make_multikey, haystack="needles", key="uuid", value="uuid"),
    "niah_multivalue": niah.make_multivalue,
    "niah_multiquery": niah.make_multiquery,
    "vt": vt.make,
    "cwe": words.make_common,
    "fwe": words.make_frequent,
    "qa_1": qa.make_one_hop,
    "qa_2": qa.make_two_hops,
    "extraction": extraction.make,
    "orders": orders.make,
    "longgen": longgen.make,
}
