"""The receipt: stable keys, plain JSON, and numbers that can be computed another way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import farkv
from farkv.hf.load import load_model
from farkv.hf.packed import PackedLinear
from farkv.hf.rss import count_weights
from farkv.kernels.native import load_native
from farkv.methods import XKV, Full, InfiniGen, Method, Oracle, Random, Window
from farkv.receipt_text import FALLBACK_WORDS, rows_of
from farkv.store.sizes import LayerShape, fetched_bytes
from tests.models import generate, make_model, make_prompt

TOKENS, NEW = 60, 6
PROMPT = make_prompt(1, tokens=TOKENS)
SELECTORS: dict[str, Method] = {
    "ours": InfiniGen(fraction=0.2),
    "paper": InfiniGen(fraction=0.4, paper=True),
    "alpha": InfiniGen(fraction=0.2, alpha=3.0),
    "top_p": InfiniGen(fraction=0.2, top_p=0.5),
    "window": Window(fraction=0.2),
    "random": Random(fraction=0.2),
    "oracle": Oracle(fraction=0.2),
}
# design.md, "The receipt": the keys are stable.
KEYS = {
    "": "model weights device threads method fraction_asked answer stop_reason context_tokens session_tokens "
    "generated_tokens rss kv_bytes limits read_fraction index_fraction "
    "resident_fraction kept_fraction managed_read_fraction managed_resident_fraction managed_kept_fraction "
    "least_read_fraction peak_read_fraction exact notes fetched_bytes_per_token disk_bytes_per_token "
    "evicted_records kernel fallbacks quant time quality drafts layers versions",
    "kv_bytes": "total near_peak host_peak disk_peak index_peak",
    "weights": "dtype source",
    "rss": "peak weights",
    "limits": "near host disk",
    "quant": "host disk max_error",
    "time": "prefill_s decode_s tokens_per_s first_token_s total_s",
    "quality": "steps top1_agreement kl_mean mass_mean mass_min",
    "layers": "layer managed why read_fraction kept_fraction mass_mean",
}


def run(method: Method, family: str = "llama", near: Any = None, prompt: Any = PROMPT, **options: Any) -> Any:
    model = make_model(family)
    with farkv.attach(model, method, near=near) as far:
        generate(model, prompt, far.new_cache(**options), n=NEW)
        return far.receipt()


def test_the_keys_are_exactly_the_stable_ones() -> None:
    row = run(InfiniGen(fraction=0.3), near="1MiB", verify=2).to_dict()
    for place, names in KEYS.items():
        part = row if not place else row[place]
        part = part[0] if isinstance(part, list) else part
        assert list(part) == names.split(), place
    assert json.loads(json.dumps(row)) == row
    assert run(InfiniGen(fraction=0.3)).to_dict()["quality"] is None
    # Only exact generation drafts (test_exact_generate.py).
    assert row["drafts"] is None


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_every_receipt_is_json(family: str, near: Any) -> None:
    row = run(InfiniGen(fraction=0.3), family, near, verify=1).to_dict()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert len(row["layers"]) == 4
    assert all((layer["why"] is None) == layer["managed"] for layer in row["layers"])


@pytest.mark.parametrize("near", [None, "1MiB"])
@pytest.mark.parametrize("method", SELECTORS)
def test_no_selector_reads_more_than_its_cap(method: str, near: Any) -> None:
    for prompt in (PROMPT, make_prompt(3, tokens=TOKENS, pad=20)):
        receipt = run(SELECTORS[method], near=near, prompt=prompt)
        assert 0 < receipt.read_fraction <= SELECTORS[method].fraction + 1e-9  # type: ignore[operator]
        assert all(0 < row.read_fraction <= 1 for row in receipt.layers)
        mean = sum(row.read_fraction for row in receipt.layers) / len(receipt.layers)
        assert receipt.read_fraction == pytest.approx(mean)


def test_full_reads_all() -> None:
    receipt = run(Full())
    assert receipt.read_fraction == 1.0
    assert receipt.index_fraction == 0.0
    assert run(InfiniGen(fraction=1.0)).read_fraction == 1.0


def test_the_counts_are_those_of_the_run() -> None:
    receipt = run(InfiniGen(fraction=0.3))
    assert receipt.context_tokens == TOKENS + NEW - 1
    token = 4 * 2 * 2 * 8 * 4
    assert receipt.kv_bytes.total == receipt.context_tokens * token
    assert receipt.kv_bytes.host_peak >= receipt.kv_bytes.total
    assert receipt.kept_fraction == 1.0
    assert receipt.time.tokens_per_s > 0
    assert receipt.limits == type(receipt.limits)(None, None, None)
    assert receipt.method == "infinigen"
    native = load_native()
    assert receipt.kernel == ("torch-sdpa" if native is None else f"{native.name}+torch-sdpa")
    assert run(SELECTORS["paper"]).method == "infinigen-paper"


def test_the_index_is_counted() -> None:
    receipt = run(InfiniGen(fraction=0.3, top_up=0.0, columns=4), near="1MiB")
    # Four 4-bit columns of an 8-wide head against 16 float32 of its record, of all but the newest.
    assert 0.9 * 2 / 64 < receipt.index_fraction < 2 / 64
    tokens = receipt.context_tokens - 1
    assert receipt.kv_bytes.index_peak >= 4 * 2 * 2 * tokens
    assert receipt.kv_bytes.near_peak >= receipt.kv_bytes.index_peak


@pytest.mark.parametrize("method", [InfiniGen(fraction=0.3), InfiniGen(fraction=0.3, top_up=0.0, index_bits=8)])
@pytest.mark.parametrize("near", [None, "1MiB"])
def test_the_default_index_stays_within_a_tenth(method: InfiniGen, near: str | None) -> None:
    assert 0 < run(method, near=near).index_fraction <= 0.10


def test_fetched_bytes_are_predicted_by_the_sizes() -> None:
    model, method = make_model("llama"), InfiniGen(fraction=0.3)
    with farkv.attach(model, method, near="1MiB") as far:
        cache = far.new_cache()
        generate(model, PROMPT, cache, n=NEW)
        receipt = far.receipt()
    shape = LayerShape(1, 2, 8, 8, 4)
    budgets = [cache.engine.parts.budgets.split(TOKENS + step, 0) for step in range(1, NEW)]
    expected = sum(4 * fetched_bytes(shape, b.early + b.late) for b in budgets) / len(budgets)
    # Recently used records need not cross again.
    assert 0 < receipt.fetched_bytes_per_token <= expected
    assert run(method).fetched_bytes_per_token == 0, "the pool is near memory"


def test_full_fetches_everything_from_a_far_pool() -> None:
    receipt = run(Full(), near="1MiB")
    token = 4 * 2 * 2 * 8 * 4
    assert receipt.fetched_bytes_per_token == token * (TOKENS + 1 + TOKENS + NEW - 1) / 2


def test_the_schema_in_the_docs_is_this_one() -> None:
    documented = [
        p for p in Path(__file__).parents[2].glob("docs/**/*.md") if '"fetched_bytes_per_token"' in p.read_text()
    ]
    for path in documented:
        found = set(re.findall(r'"(\w+)":', path.read_text()))
        assert set(KEYS[""].split()) <= found, path


def test_the_receipt_says_that_the_skew_is_the_prompts() -> None:
    receipt = run(InfiniGen(fraction=0.4, paper=True))
    # The first layer is read whole.
    assert receipt.fallbacks["skew_from_prompt"] >= len(receipt.layers) - 1
    assert run(InfiniGen(fraction=0.3)).fallbacks == {}, "ours never has another"
    assert run(Window(fraction=0.3)).fallbacks == {}


def test_it_says_what_it_ran_on_and_what_was_asked_for() -> None:
    receipt = run(InfiniGen(fraction=0.3))
    assert (receipt.device, receipt.threads, receipt.weights.dtype) == ("cpu", torch.get_num_threads(), "float32")
    assert (receipt.fraction_asked, run(InfiniGen()).fraction_asked) == (0.3, None)
    assert run(XKV(fraction=0.4)).fraction_asked == 0.4
    model = make_model("llama")
    weights = {p.data_ptr(): p.nbytes for p in (*model.parameters(), *model.buffers())}
    assert receipt.rss.weights == sum(weights.values())
    assert receipt.rss.peak is not None
    # torch alone takes more than this.
    assert receipt.rss.peak > 50 << 20


def test_packed_weights_are_counted_as_they_are() -> None:
    whole, packed = (load_model("demo", device="cpu", weights=weights)[0] for weights in ("none", "int8"))
    assert 0.2 * count_weights(whole) < count_weights(packed) < 0.6 * count_weights(whole)
    assert count_weights(packed) >= sum(m.count_bytes() for m in packed.modules() if isinstance(m, PackedLinear))


def test_the_table_has_no_internal_name() -> None:
    receipt = run(InfiniGen(fraction=0.4, paper=True))
    text = str(receipt)
    assert "skew_from_prompt" in receipt.fallbacks
    assert not any(name in text for name in FALLBACK_WORDS)
    assert all(what in text for name, (_, what) in FALLBACK_WORDS.items() if name in receipt.fallbacks)
    assert "as long as it may be" in text
    assert "asked for" in text
    assert max(len(line) for line in text.split("\n")[: len(rows_of(receipt)) + 1]) <= 80
