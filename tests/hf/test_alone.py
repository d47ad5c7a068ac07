"""One sequence's answer is its own: the same alone and in any batch, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farkv
from farkv.errors import CacheStateError, CapacityError
from farkv.methods import XKV, Full, InfiniGen, Oracle, Random, Window
from tests.hf.tape import Tape
from tests.models import generate, make_model, make_prompt

STEPS = 12
# Six columns: with fewer, of heads as small as these, records tie, and any choice among them is as good.
METHODS: dict[str, Any] = {
    "ours": InfiniGen(fraction=0.3, columns=6),
    "default": InfiniGen(columns=6),
    "alpha": InfiniGen(fraction=0.3, columns=6, alpha=2.0),
    "top_p": InfiniGen(fraction=0.3, columns=6, top_p=0.5),
    "no_top_up": InfiniGen(fraction=0.3, columns=6, top_up=0.0),
    # With fewer columns records tie nearly, and rounding decides.
    "eight_bits": InfiniGen(fraction=0.2, columns=6, index_bits=8, source="attn"),
    "window": Window(fraction=0.3),
    "oracle": Oracle(fraction=0.3),
    "full": Full(),
}
# One to four, and more; some shorter than the window, some of too few tokens for a skew of their own.
LENGTHS = {"ragged": (96, 24, 53, 9), "long": (150, 70, 110), "tiny": (12, 3, 40, 1)}


def make_texts(lengths: tuple[int, ...], seed: int = 20) -> list[torch.Tensor]:
    """Return random token ids, the same for a length whatever others are asked for."""
    return [make_prompt(1, tokens=n, seed=seed + n)["input_ids"][0] for n in lengths]


def pad_left(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the texts as one batch."""
    n = max(map(len, texts))
    pads = torch.tensor([n - len(t) for t in texts])[:, None]
    ids = torch.stack([torch.nn.functional.pad(t, (n - len(t), 0)) for t in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(n) >= pads).long()}


class Run:
    """What each sequence of a batch read at every step, and the logits it gave."""

    def __init__(self, far: Any, texts: list[torch.Tensor], steps: int = STEPS, **options: Any):
        batch = pad_left(texts)
        cache = far.new_cache()
        with Tape(far.model, cache) as tape:
            # The embedding of padding is zero: its query scores all records alike, and any choice is as good.
            out = generate(far.model, batch, cache, n=steps + 1, suppress_tokens=[0], **options)
        n = batch["input_ids"].shape[1]
        self.tokens = out.sequences[:, n:]
        self.logits = torch.stack(list(out.logits))
        self.pads = [n - len(t) for t in texts]
        self.reads = [p.reads for p in tape.decode()]

    def read(self, i: int) -> list[dict[int, list[list[int]]]]:
        """Return the places that sequence `i` read, counted from its own first token, by step, layer and KV head."""
        found = []
        for reads in self.reads:
            step = {}
            for layer, (positions, valid) in reads.items():
                keep = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
                # Padding that is read with everything else is hidden by the mask.
                keep = keep & (positions >= self.pads[i])
                rows = zip(positions[i], keep[i], strict=True)
                step[layer] = [sorted((row[flag] - self.pads[i]).tolist()) for row, flag in rows]
            found.append(step)
        return found


def assert_alone(together: Run, i: int, alone: Run) -> None:
    """Assert that sequence `i` of a batch chose and answered as it did alone."""
    for step, (a, b) in enumerate(zip(alone.read(0), together.read(i), strict=True)):
        for layer in b:
            # Alone a short text may be read whole without a choice.
            assert a[layer] == b[layer], f"sequence {i}, step {step}, layer {layer}"
    a, b = alone.logits[:, 0], together.logits[:, i]
    assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert torch.equal(alone.tokens[0], together.tokens[i])


def make_profile(model: Any, kind: str) -> Any:
    return farkv.profile(model, [make_prompt(1, tokens=60, seed=8)["input_ids"][0]]) if kind == "profile" else False


NEARS = (None, "1MiB")
CASES = [
    *((m, "ragged", "prompt", near) for m in METHODS for near in NEARS),
    *((m, "ragged", "profile", near) for m in ("ours", "alpha", "top_p") for near in NEARS),
    *((m, n, "prompt", None) for m in ("ours", "default", "top_p", "window") for n in ("long", "tiny")),
]


@pytest.mark.parametrize(("method", "lengths", "skew", "near"), CASES)
def test_alone_as_in_any_batch(method: str, lengths: str, skew: str, near: Any) -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS[lengths])
    with farkv.attach(model, METHODS[method], profile=make_profile(model, skew), near=near) as far:
        together = Run(far, texts)
        for i, text in enumerate(texts):
            assert_alone(together, i, Run(far, [text]))


def test_alone_though_padding_moves_the_edges_of_chunks() -> None:
    model = make_model("llama")
    # Without a chunk of one token, which would be a decode step.
    texts = make_texts((150, 70, 113))
    with farkv.attach(model, METHODS["ours"], profile=False) as far:
        together = Run(far, texts, prefill_chunk_size=32)
        for i, text in enumerate(texts):
            assert_alone(together, i, Run(far, [text]))


@pytest.mark.parametrize("method", ["ours", "alpha", "top_p", "window", "oracle"])
def test_what_the_others_say_changes_nothing(method: str) -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS["ragged"])
    others = [texts[0], *make_texts(LENGTHS["ragged"][1:], seed=70)]
    with farkv.attach(model, METHODS[method], profile=False) as far:
        mine, theirs = Run(far, texts), Run(far, others)
    assert not torch.equal(mine.logits[:, 1:], theirs.logits[:, 1:])
    assert torch.equal(mine.logits[:, 0], theirs.logits[:, 0])
    assert mine.read(0) == theirs.read(0)


def test_random_reads_as_many_as_alone() -> None:
    model = make_model("llama")
    texts = make_texts(LENGTHS["ragged"])
    with farkv.attach(model, Random(fraction=0.3)) as far:
        together = Run(far, texts)
        for i, text in enumerate(texts):
            counts = [
                [[len(row) for row in rows] for step in run.read(j) for rows in step.values()]
                for run, j in ((together, i), (Run(far, [text]), 0))
            ]
            assert counts[0] == counts[1]


# --- joining and leaving ----------------------------------------------------------------------------------------


class Serving:
    """A batch whose sequences come and go: each is read alone, decodes greedily, and has its tokens and logits kept."""

    def __init__(self, far: Any):
        self.far, self.model = far, far.model
        self.cache: Any = None
        self.names: list[str] = []
        self.masks: list[torch.Tensor] = []
        self.logits: dict[str, list[torch.Tensor]] = {}

    def read(self, name: str, text: torch.Tensor) -> None:
        """Read a text alone and let it join."""
        cache = self.far.new_cache()
        self.logits[name] = [self.model(input_ids=text[None], past_key_values=cache).logits[0, -1]]
        if self.cache is None:
            self.cache = cache
        else:
            self.cache.join(cache)
            assert cache.get_seq_length() == 0
            assert cache.engine.store.host.used == cache.engine.store.near.used == 0
        n = self.cache.get_seq_length()
        self.names.append(name)
        self.masks = [*self.masks, torch.ones(len(text), dtype=torch.long)]
        self.masks = [torch.nn.functional.pad(mask, (n - len(mask), 0)) for mask in self.masks]

    def step(self) -> None:
        """Decode one token of every sequence."""
        ids = torch.stack([self.logits[name][-1][1:].argmax() + 1 for name in self.names])[:, None]
        self.masks = [torch.nn.functional.pad(mask, (0, 1), value=1) for mask in self.masks]
        mask = torch.stack(self.masks)
        places = mask.sum(-1, keepdim=True) - 1
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache)
        for name, logits in zip(self.names, out.logits[:, -1], strict=True):
            self.logits[name].append(logits)

    def leave(self, name: str) -> None:
        """Let a sequence go."""
        stay = [i for i, other in enumerate(self.names) if other != name]
        self.cache.batch_select_indices(torch.tensor(stay))
        self.names, self.masks = [self.names[i] for i in stay], [self.masks[i] for i in stay]


def run_alone(far: Any, text: torch.Tensor, steps: int) -> list[torch.Tensor]:
    serving = Serving(far)
    serving.read("alone", text)
    for _ in range(steps):
        serving.step()
    return serving.logits["alone"]


def assert_near(ours: list[torch.Tensor], alone: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(alone)
    for step, (a, b) in enumerate(zip(ours, alone, strict=True)):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"step {step}"


COMERS = {"a": 80, "b": 23, "c": 41, "d": 5}


@pytest.mark.parametrize(
    ("method", "limits", "family"),
    [
        ("ours", {}, "llama"),
        ("ours", {"near": "1MiB", "host": "4MiB"}, "llama"),
        ("top_p", {"near": "1MiB"}, "llama"),
        ("window", {}, "llama"),
        ("full", {"near": "1MiB"}, "llama"),
        ("ours", {}, "gemma3"),
    ],
)
def test_sequences_join_and_leave_as_they_like(method: str, limits: dict[str, str], family: str) -> None:
    model = make_model(family)
    texts = dict(zip(COMERS, make_texts(tuple(COMERS.values())), strict=True))
    with farkv.attach(model, METHODS[method], profile=False, **limits) as far:
        serving = Serving(far)
        for coming, going in (("a", ""), ("b", ""), ("c", "a"), ("d", "c")):
            serving.read(coming, texts[coming])
            for _ in range(3):
                serving.step()
            if going:
                serving.leave(going)
                serving.step()
        for name, text in texts.items():
            assert_near(serving.logits[name], run_alone(far, text, len(serving.logits[name]) - 1))


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_coded_records_join_too(quant: str) -> None:
    model = make_model("llama")
    texts = make_texts((60, 23))
    with farkv.attach(model, InfiniGen(fraction=0.3), profile=False, near="1MiB", quant=quant) as far:
        serving = Serving(far)
        for name, text in zip("ab", texts, strict=True):
            serving.read(name, text)
        for _ in range(4):
            serving.step()
        for name, text in zip("ab", texts, strict=True):
            # Rounding to codes makes more of a difference in the last bit.
            assert_near(serving.logits[name], run_alone(far, text, 4), tolerance=1e-3)


def test_after_one_has_left_the_others_are_as_they_were() -> None:
    model = make_model("llama")
    texts = make_texts((60, 23, 41))
    with farkv.attach(model, InfiniGen(fraction=0.3), profile=False) as far:
        serving = Serving(far)
        for name, text in zip("abc", texts, strict=True):
            serving.read(name, text)
        serving.step()
        engine = serving.cache.engine
        pool = [rows.view()[1:].clone() for rows in engine.store.pool.values()]
        codes = [fit.index.codes()[1:].clone() for fit in engine.selector.fits.values()]
        serving.leave("a")
        assert all(torch.equal(a, rows.view()) for a, rows in zip(pool, engine.store.pool.values(), strict=True))
        fits = engine.selector.fits.values()
        assert all(torch.equal(a, fit.index.codes()) for a, fit in zip(codes, fits, strict=True))
        for _ in range(4):
            serving.step()
        for name, text in zip("bc", texts[1:], strict=True):
            assert_near(serving.logits[name], run_alone(far, text, 5))


def test_what_cannot_join_says_why_and_changes_nothing() -> None:
    model = make_model("llama")
    ids = make_texts((40,))[0][None]

    def read(far: Any) -> Any:
        cache = far.new_cache()
        model(input_ids=ids, past_key_values=cache)
        return cache

    with farkv.attach(model, InfiniGen(fraction=0.3), host="60KiB") as far:
        a, b = read(far), read(far)
        before = a.engine.store.pool[0].view().clone()
        with pytest.raises(CapacityError, match=r"host limit: a batch of 2 sequences of 40 tokens needs"):
            a.join(b)
        assert torch.equal(a.engine.store.pool[0].view(), before)
        assert a.get_seq_length() == b.get_seq_length() == 40
        with pytest.raises(CacheStateError, match="one of them is empty"):
            a.join(far.new_cache())
        with pytest.raises(CacheStateError, match="made by one attached model"):
            a.join(a)
    with farkv.attach(model, Window(fraction=0.3)) as far, pytest.raises(CacheStateError, match="of one method"):
        read(far).join(a)
    with farkv.attach(model, XKV(fraction=0.5)) as far, pytest.raises(CacheStateError, match="may be evicted"):
        read(far).join(read(far))
    with (
        farkv.attach(make_model("lfm2"), Window(fraction=0.3)) as far,
        pytest.raises(CacheStateError, match="keys and"),
    ):
        caches = [far.new_cache(), far.new_cache()]
        for cache in caches:
            far.model(input_ids=ids, past_key_values=cache)
        caches[0].join(caches[1])


def test_a_second_turn_whose_padding_leaves_holes() -> None:
    model = make_model("llama")
    first, second = make_texts((60, 23, 9)), make_texts((3, 7, 1), seed=40)

    def talk(far: Any, texts: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
        cache, batch, turn = far.new_cache(), pad_left(texts), pad_left(more)
        heard = generate(model, batch, cache, n=4, suppress_tokens=[0]).sequences
        ids = torch.cat([heard, turn["input_ids"]], 1)
        answered = torch.ones(len(texts), 4, dtype=torch.long)
        mask = torch.cat([batch["attention_mask"], answered, turn["attention_mask"]], 1)
        prompt = {"input_ids": ids, "attention_mask": mask}
        return list(generate(model, prompt, cache, n=6, suppress_tokens=[0]).logits)

    # With holes plain operations choose, so they must alone, too: what ties nearly may be resolved either way.
    with farkv.attach(model, METHODS["ours"], profile=False, near="1MiB", kernel="plain") as far:
        together = talk(far, first, second)
        for i in range(3):
            assert_near([logits[i] for logits in together], [x[0] for x in talk(far, [first[i]], [second[i]])])
