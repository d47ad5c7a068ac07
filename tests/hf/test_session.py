"""Sessions: read once, asked again from a file that asking never changes; wrong or forged ones are refused in words."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import farkv
from farkv.errors import CacheStateError, CapacityError, FarKVError, SessionError, StoreError
from farkv.hf._compat import find_layer_class
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.session import load_cache, read_session_text, resume
from farkv.methods import XKV, Full, InfiniGen, LowBit, Method, Oracle, Pages, Random, Window
from farkv.session.file import Saved, write_saved
from farkv.store.placement import Placement
from tests.models import forward, make_model, make_prompt, plain_cache

QUESTION = make_prompt(1, tokens=4, seed=9)["input_ids"]


def make(family: str = "llama", **changes: Any) -> Any:
    return make_model(family, max_position_embeddings=1024, **changes)


def text_of(tokens: int) -> torch.Tensor:
    return make_prompt(1, tokens=tokens)["input_ids"]


def ask(model: Any, cache: Any, question: torch.Tensor = QUESTION) -> torch.Tensor:
    """Feed a question token by token; return all logits."""
    return torch.cat([forward(model, token, cache) for token in question.split(1, 1)], 1)


def read_plainly(model: Any, tokens: int) -> torch.Tensor:
    """Return the question's logits of the model alone."""
    cache = plain_cache(model)
    forward(model, text_of(tokens), cache)
    return ask(model, cache)


def write(far: Handle, path: Path, tokens: int, **options: Any) -> FarCache:
    """Read a text and save it."""
    cache = far.new_cache()
    forward(far.model, text_of(tokens), cache)
    cache.save(path, **options)
    return cache


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("tokens", [20, 300])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"])
def test_a_session_equals_the_plain_model(family: str, tokens: int, tmp_path: Path) -> None:
    model, path = make(family), tmp_path / "a.farkv"
    plain = read_plainly(model, tokens)
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        write(far, path, tokens)
        before = digest(path)
        for _ in range(2):
            cache = farkv.load_cache(path, model)
            assert cache.get_seq_length() == tokens
            assert torch.equal(ask(model, cache), plain)
    with farkv.attach(model, Full()) as far:
        cache = farkv.load_cache(path, model)
        assert torch.equal(ask(model, cache), plain)
        assert far.receipt().exact == "bit"
    assert digest(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.farkv"]


STORAGE: dict[str, dict[str, Any]] = {
    "open": {},
    "tight": {"host": "540KiB"},
    "near": {"near": "80KiB"},
    "disk": {"disk": "{}/kv:10MiB"},
    "int8": {"quant": "int8"},
}


@pytest.mark.parametrize("storage", list(STORAGE))
@pytest.mark.parametrize(
    "method",
    [Full(), InfiniGen(fraction=0.3), Oracle(fraction=0.3), Window(fraction=0.3), Pages(), LowBit(), LowBit(bits=4)],
)
def test_two_loads_give_the_same_bits(method: Method, storage: str, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a.farkv"
    options = {k: v.format(tmp_path) if k == "disk" else v for k, v in STORAGE[storage].items()}
    with farkv.attach(model, method, quant=options.get("quant")) as far:
        write(far, path, 600)
    before, answers = digest(path), []
    with farkv.attach(model, method, **options) as far:
        for _ in range(2):
            # Two at once would not fit a near limit: they share it.
            cache = None
            cache = load_cache(path, model)
            answers.append(ask(model, cache))
            assert far.receipt(cache).kv_bytes.host_peak <= (far.setting.limits.host or 2**40)
    assert torch.equal(answers[0], answers[1])
    assert digest(path) == before
    if isinstance(method, Full):
        torch.testing.assert_close(
            answers[0], read_plainly(model, 600), atol=0.1 if "quant" in options else 2e-5, rtol=0
        )


@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_bfloat16_and_a_young_skew(tokens: int, tmp_path: Path) -> None:
    model = copy.deepcopy(make()).to(torch.bfloat16)
    with farkv.attach(model, InfiniGen(fraction=0.3), near="1MiB", kernel="plain") as far:
        cache = write(far, tmp_path / "a", tokens)
        one, two = (load_cache(tmp_path / "a", model) for _ in range(2))
        assert torch.equal(ask(model, one), ask(model, two))
        if tokens < 256:
            # Nothing is on disk but the open page, and both are far, so both choose alike.
            torch.testing.assert_close(ask(model, load_cache(tmp_path / "a", model)), ask(model, cache))
        # The skew is the text's own, however short it is, and comes with the session.
        assert far.receipt(one).fallbacks == {} or tokens == 1


@pytest.mark.parametrize("paper", [False, True])
def test_a_profile_comes_and_goes(paper: bool, tmp_path: Path) -> None:
    model = make()
    profile = farkv.profile(model, [text_of(80)[0].tolist()])
    method = InfiniGen(fraction=0.6, paper=paper)
    with farkv.attach(model, method, profile=profile) as far:
        write(far, tmp_path / "with", 20)
        expected = ask(model, load_cache(tmp_path / "with", model))
    with farkv.attach(model, method, profile=False) as far:
        write(far, tmp_path / "without", 20)
        # What was made with a profile is final: nothing is fitted again.
        cache = load_cache(tmp_path / "with", model)
        assert torch.equal(ask(model, cache), expected)
        assert far.receipt(cache).fallbacks == {}
    with farkv.attach(model, method, profile=profile):
        ask(model, load_cache(tmp_path / "without", model))


def test_several_questions_on_one_cache_and_a_longer_text(tmp_path: Path) -> None:
    model, path = make("gemma3"), tmp_path / "a"
    other = make_prompt(1, tokens=5, seed=3)["input_ids"]
    with farkv.attach(model, InfiniGen(fraction=1.0)) as far:
        write(far, path, 300)
        cache = load_cache(path, model)
        first = [ask(model, copy.deepcopy(cache), q) for q in (QUESTION, other)]
        assert torch.equal(ask(model, copy.deepcopy(cache), QUESTION), first[0])
        assert torch.equal(ask(model, load_cache(path, model), other), first[1])
        # What was read since can be saved too, over the file that it is read from.
        longer = copy.deepcopy(cache)
        forward(model, text_of(700)[:, 300:], longer)
        longer.save(path)
        again = load_cache(path, model)
        assert again.get_seq_length() == 700
        # Two passes sum in another order than one.
        torch.testing.assert_close(ask(model, again), read_plainly(model, 700), atol=2e-5, rtol=0)
        assert torch.equal(ask(model, cache, other), first[1]), "the old file stays with its readers"


ALIKE: dict[str, tuple[Method, dict[str, Any]]] = {
    "full": (Full(), {}),
    "infinigen": (InfiniGen(fraction=0.1), {}),
    "plain": (InfiniGen(fraction=0.1), {"kernel": "plain"}),
    "near": (InfiniGen(fraction=0.1), {"near": "400KiB"}),
    "int8": (InfiniGen(fraction=0.1), {"quant": "int8"}),
    "lowbit": (LowBit(fraction=0.1), {}),
    "pages": (Pages(fraction=0.3), {}),
}


@pytest.mark.parametrize("case", list(ALIKE))
def test_a_text_that_memory_holds_is_asked_as_if_it_had_just_been_read(case: str, tmp_path: Path) -> None:
    method, options = ALIKE[case]
    model, path = make(), tmp_path / "a"
    with farkv.attach(model, method, **options) as far:
        cache = write(far, path, 600)
        answer, receipt = ask(model, cache), far.receipt(cache)
        placement = cache.engine.store.placement
        cache.reset()
        again = load_cache(path, model)
        assert again.engine.store.placement is placement is not Placement.DISK
        assert torch.equal(ask(model, again), answer)
        told = far.receipt(again)
        assert (told.kernel, told.read_fraction, told.exact) == (receipt.kernel, receipt.read_fraction, receipt.exact)
        assert told.disk_bytes_per_token == 0


def test_where_a_saved_text_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make(), tmp_path / "a"
    with farkv.attach(model, Full()) as far:
        write(far, path, 600)

    def place(tokens: int = 0, **options: Any) -> Placement:
        with farkv.attach(model, Full(), **options):
            return load_cache(path, model, tokens=tokens).engine.store.placement

    # Records of 300 KiB; where no length is given, memory must hold them twice.
    assert place() is place(host="800KiB") is place(610, host="400KiB") is Placement.IN_PLACE
    assert place(host="400KiB") is place(1000, host="400KiB") is Placement.DISK
    assert place(host="800KiB", evict="lru") is place(disk=f"{tmp_path}/kv:1MiB") is Placement.DISK
    monkeypatch.setattr("farkv.hf.session.count_memory", lambda: 500 << 10)
    assert place() is Placement.DISK
    assert place(host="800KiB") is Placement.IN_PLACE


def test_loading_is_lazy(tmp_path: Path) -> None:
    model, path = make("llama", num_hidden_layers=2), tmp_path / "a"
    with farkv.attach(model, InfiniGen(fraction=0.1), host="400KiB") as far:
        write(far, path, 1000).reset()
        cache = load_cache(path, model)
        assert cache.account.disk_bytes == 0
        ask(model, cache, QUESTION[:, :1])
        assert 0 < far.receipt(cache).disk_bytes_per_token < path.stat().st_size / 2


def test_a_prefix_is_reused_and_another_text_refused(tmp_path: Path) -> None:
    model, path, ids = make(), tmp_path / "a", text_of(40)[0].tolist()
    with farkv.attach(model, Full()) as far:
        write(far, path, 40, text="it was a night")
        cache = load_cache(path, model)
        resume(cache, [*ids, 5, 6])
        assert cache.get_seq_length() == 40
        resume(cache, [*ids[:-3], 5])
        assert cache.token_ids.tolist() == ids[:-3]
        with pytest.raises(SessionError, match="differ at 2"):
            resume(cache, [*ids[:2], 0, 0])
    assert read_session_text(path) == "it was a night"
    assert read_session_text(path, "it was a night and") == "it was a night and"
    with pytest.raises(SessionError, match="differ at 7"):
        read_session_text(path, "it was the night")
    write_saved(tmp_path / "b", {}, {"text": torch.empty(0, dtype=torch.uint8)}, [], 0, 1)
    with pytest.raises(SessionError, match="give --file"):
        read_session_text(tmp_path / "b")


def train_on() -> Any:
    """Return a model of which one projection has moved, as a merged adapter leaves it."""
    model = copy.deepcopy(make())
    model.model.layers[2].self_attn.q_proj.weight.data *= 1.02
    return model


REFUSED: dict[str, tuple[str, Callable[[], tuple[Any, tuple[Method, ...], dict[str, Any]]]]] = {
    "model": ("its model", lambda: (make(initializer_range=0.1), (Full(),), {})),
    "adapter": ("its model", lambda: (train_on(), (Full(),), {})),
    "family": ("its model", lambda: (make("qwen2"), (Full(),), {})),
    "layers": ("its model", lambda: (make(num_hidden_layers=3), (Full(),), {})),
    "dtype": ("its records.*float32.*bfloat16", lambda: (copy.deepcopy(make()).to(torch.bfloat16), (Full(),), {})),
    "index": ("its index was made with", lambda: (make(), (InfiniGen(fraction=0.3),), {})),
    "quant": ("its quant: None, expected int8", lambda: (make(), (Full(),), {"quant": "int8"})),
    "keep": ("levers keep and near", lambda: (make(), (XKV(fraction=0.5),), {})),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_did_not_make_it_cannot_ask_it(case: str, tmp_path: Path) -> None:
    says, make_case = REFUSED[case]
    with farkv.attach(make(), Full()) as far:
        write(far, tmp_path / "a", 30)
    model, methods, options = make_case()
    with farkv.attach(model, *methods, **options), pytest.raises(SessionError, match=says) as caught:
        load_cache(tmp_path / "a", model)
    assert str(caught.value).startswith("session ")
    with pytest.raises(CacheStateError, match="not attached"):
        load_cache(tmp_path / "a", model)


class Words:
    """A tokenizer as far as a session knows one."""

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


def test_another_tokenizer_or_limit_is_refused(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a"
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        write(far, path, 30, tokenizer=Words("x"))
        load_cache(path, model, tokenizer=Words("x"))
        load_cache(path, model)
        with pytest.raises(SessionError, match="its tokenizer"):
            load_cache(path, model, tokenizer=Words("y"))
    with farkv.attach(model, InfiniGen(fraction=0.3), host="4KiB"), pytest.raises(CapacityError, match="host"):
        load_cache(path, model)


def test_only_one_whole_text_is_saved(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a"
    path.write_bytes(b"what was there")
    with farkv.attach(model, InfiniGen(fraction=0.3), host="300KiB", evict="lru") as far:
        for prompt, says in ((make_prompt(2), "2 sequences"), (make_prompt(2, pad=5), "2 sequences")):
            model(**prompt, past_key_values=(cache := far.new_cache()))
            with pytest.raises(CacheStateError, match=says):
                cache.save(path)
        prompt = make_prompt(2, pad=5)
        one = {name: tensor[:1] for name, tensor in prompt.items()}
        model(**one, past_key_values=(cache := far.new_cache()))
        with pytest.raises(CacheStateError, match="padded"):
            cache.save(path)
        cache = far.new_cache()
        with pytest.raises(CacheStateError, match="read nothing"):
            cache.save(path)
        model(inputs_embeds=model.get_input_embeddings()(text_of(9)), past_key_values=cache)
        with pytest.raises(CacheStateError, match="inputs_embeds"):
            cache.save(path)
        cache = far.new_cache()
        for piece in text_of(900).split(100, 1):
            forward(model, piece, cache)
        with pytest.raises(CacheStateError, match="evicted"):
            cache.save(path)
        cache = far.new_cache()
        forward(model, text_of(9), cache)
        with pytest.raises(SessionError, match="UTF-8"):
            cache.save(path, text="\ud800")
    linear = make("qwen3_next")
    with farkv.attach(linear, Full()) as far:
        forward(linear, text_of(9), cache := far.new_cache())
        # Keys and states in one.
        cache.layers[0] = find_layer_class("hybrid")()
        with pytest.raises(CacheStateError, match="no session can hold"):
            cache.save(path)
    assert path.read_bytes() == b"what was there"


def test_random_and_plans_that_fetch_are_no_obstacle(tmp_path: Path) -> None:
    model = make()
    with farkv.attach(model, Random(fraction=0.3)) as far:
        write(far, tmp_path / "a", 40)
        assert ask(model, load_cache(tmp_path / "a", model)).isfinite().all()


def test_a_damaged_page_that_is_needed_is_an_error(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a"
    with farkv.attach(model, Full()) as far:
        write(far, path, 600)
        whole, good = path.read_bytes(), ask(model, held := load_cache(path, model))
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        with pytest.raises(StoreError, match="damaged"):
            load_cache(path, model)
        path.write_bytes(whole)
        assert torch.equal(ask(model, load_cache(path, model)), good)
        # What is in memory needs the file no more.
        path.unlink()
        assert forward(model, QUESTION, held).isfinite().all()
        path.write_bytes(whole)
    with farkv.attach(model, Full(), disk=f"{tmp_path}/kv:10MiB"):
        cache, twin = load_cache(path, model), load_cache(path, model)
        good = ask(model, twin)
        whole = path.read_bytes()
        path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
        for held in (cache, load_cache(path, model)):
            with pytest.raises(StoreError, match="damaged"):
                ask(model, held)
        path.write_bytes(whole)
        # The pass that failed is taken back.
        assert torch.equal(ask(model, cache), good)


# --- files that say something else --------------------------------------------------------------------------

WRONG_NOTES: dict[str, list[Any]] = {
    "identity": [None, {}, 3],
    "tokenizer": [{}, 3.5],
    "page": [None, [], [0, 0, "float32"], [256, 16, "float16"], [1, 16, "float32"], [2**40, 16, "float32"], "abc"],
    "record": [[2, 8, 8, "float64"], [2**31 - 1, 8, 8, "float32"], [2, 8, 8, []], {"a": 1}, [2, -8, 8, "float32"]],
    "quant": ["int8", "int2", 3, []],
    "index": [None, {}, 3, []],
    "marked": [0, -1, 99, 301, True, "a", [3], 2**70],
    "layers": [[], [0], [0, 1, 2, 99], 4, [[0]], [0, 1, 2, 3, 3], ["a"]],
}
# Types and shapes that every tensor is given in turn.
WRONG_TENSORS = [
    torch.empty(0),
    torch.tensor(3),
    torch.full((1,), 2**62),
    torch.full((1,), -1),
    torch.zeros(1, 2, 3, 4),
    torch.full((1, 2, 8, 4), float("nan")),
    torch.zeros(1, 2, 40, 2, dtype=torch.int8),
    torch.zeros(2, 2, 2, 2, 2, 2, 2, 2, dtype=torch.bool),
    torch.full((300,), 255, dtype=torch.uint8),
    torch.zeros(1, 0, 0, 0),
    torch.zeros(1, 2, 44, 16),
]


# So many tests share the forged sessions.
SHARDS = 4


def list_forged(path: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Return notes and tensors of a session, each of them wrong in its turn."""
    saved = Saved.open(path)
    notes, tensors = saved.notes, {name: saved.tensor(name) for name in saved.names}
    made = [({**notes, name: value}, tensors) for name, values in WRONG_NOTES.items() for value in values]
    made += [({k: v for k, v in notes.items() if k != name}, tensors) for name in notes]
    made += [(notes, {k: v for k, v in tensors.items() if k != name}) for name in tensors]
    made += [(notes, {**tensors, name: wrong}) for name in tensors for wrong in WRONG_TENSORS]
    extra = ["index/0/new", "unmanaged/0/keys", "tail/9", "index/0/samples", "index/0/strides"]
    return made + [(notes, {**tensors, name: WRONG_TENSORS[2]}) for name in extra]


def pages_of(saved: Saved) -> torch.Tensor:
    pages = torch.empty(saved.n_pages, saved.page_bytes, dtype=torch.uint8)
    saved.reader.read(torch.arange(saved.n_pages), pages)
    return pages


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize(("family", "tokens"), [("gemma3", 20), ("gemma3", 40), ("qwen3_next", 40), ("llama", 300)])
def test_a_forged_session_is_refused_or_does_no_harm(family: str, tokens: int, shard: int, tmp_path: Path) -> None:
    model, path, refused = make(family), tmp_path / "a", 0
    with farkv.attach(model, InfiniGen(fraction=0.3)) as far:
        cache = far.new_cache()
        for piece in text_of(tokens).split([tokens - 5, 5], 1):
            forward(model, piece, cache)
            if cache.get_seq_length() < tokens:
                cache.mark()
        cache.save(path, text="x")
        saved, good = Saved.open(path), ask(model, load_cache(path, model))
        pages = pages_of(saved)
        forged = list_forged(path)[shard::SHARDS]
        assert len(forged) > 40
        for notes, tensors in forged:
            write_saved(tmp_path / "b", notes, tensors, [pages], saved.n_pages, saved.page_bytes)
            try:
                read_session_text(tmp_path / "b")
                assert ask(model, load_cache(tmp_path / "b", model)).shape == good.shape
            except FarKVError as error:
                assert isinstance(error, SessionError | StoreError | CapacityError), error
                refused += 1
    # Not all: versions, an unknown name, or other values of the right form are no contradiction.
    assert refused > 0.9 * len(forged)


def test_an_empty_page_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    with farkv.attach(make(), Full()) as far:
        write(far, tmp_path / "a", 5)
        saved = Saved.open(tmp_path / "a")
        tensors = {name: saved.tensor(name) for name in saved.names}
        notes = saved.notes | {"page": [2**31 - 1, 16, "float32"]}
        write_saved(tmp_path / "a", notes, tensors, [], 0, (2**31 - 1) * 64)
        with pytest.raises(SessionError, match="its notes"):
            load_cache(tmp_path / "a", make())


def test_the_file_says_who_made_it(tmp_path: Path) -> None:
    with farkv.attach(make(), InfiniGen(fraction=0.3)) as far:
        write(far, tmp_path / "a", 30, text="☺", tokenizer=Words("x"))
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        notes = json.loads(file.metadata()["notes"])
        assert bytes(file.get_tensor("text").tolist()).decode() == "☺"
    assert sorted(notes) == [
        "dense",
        "exact",
        "identity",
        "index",
        "layers",
        "page",
        "quant",
        "record",
        "tokenizer",
        "versions",
    ]
    assert sorted(notes["versions"]) == ["farkv", "transformers"]
    # Another release of transformers is no obstacle, another format is.
    saved = Saved.open(tmp_path / "a")
    tensors = {name: saved.tensor(name) for name in saved.names}
    write_saved(tmp_path / "b", notes | {"versions": 9}, tensors, [pages_of(saved)], saved.n_pages, saved.page_bytes)
    with farkv.attach(make(), InfiniGen(fraction=0.3)):
        load_cache(tmp_path / "b", make())
        data = (tmp_path / "b").read_bytes().replace(b"farkv-session-2", b"farkv-session-3")
        (tmp_path / "b").write_bytes(data)
        with pytest.raises(SessionError, match=r"damaged|expected format"):
            load_cache(tmp_path / "b", make())
