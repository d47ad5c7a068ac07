"""How a configuration of `golden_rows.py` is run: tiny models with fixed weights, texts, and ways to go through them.

In: a `Row` and an empty folder. Out: tokens, logits and the receipt, or the error that refused it. Public API alone.
"""

from __future__ import annotations

import copy
import functools
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import farkv
from farkv.demo import MODEL_PATH
from farkv.errors import CacheStateError, FarKVError

VOCAB, NEW_TOKENS, N_ASKED = 97, 12, 3
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = {"head_dim": 16, "sliding_window": 16}
# name -> (configuration class, what differs from COMMON)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2}),
    # A softcap; every second layer is left to Hugging Face.
    "gemma2": ("Gemma2Config", {**SLIDING, "query_pre_attn_scalar": 16}),
    # Learned sinks.
    "gpt_oss": (
        "GptOssConfig",
        {
            **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
    ),
    # Convolutions between, no list of keys at all.
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
}  # fmt: skip


class Row(NamedTuple):
    """One configuration.

    means: facts of `golden_rows.FACTS` that must hold of its receipt.  text: sequences, tokens, padding.  plan: shares
    per layer, by lever.  profile: whether one is measured before.
    """

    name: str
    methods: tuple[Any, ...]
    means: tuple[str, ...]
    model: str
    way: str
    text: tuple[int, int, int]
    plan: dict[str, tuple[float, ...]]
    profile: bool
    attach: dict[str, Any]
    cache: dict[str, Any]
    generate: dict[str, Any]


class Played(NamedTuple):
    """What came of it: new tokens of every sequence, logits of every step, the receipt, the error that ended it."""

    tokens: list[list[int]]
    logits: list[Tensor]
    receipt: dict[str, Any] | None = None
    error: list[str] | None = None


# --- models and texts ---------------------------------------------------------------------------------------


@functools.cache
def make_model(name: str) -> PreTrainedModel:
    """Return a model, the same one at every call: detaching leaves it as it was."""
    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32).eval()
    family, _, dtype = name.partition("-")
    kind, own = MODELS[family]
    values = {**COMMON, **own, "eos_token_id": None, "bos_token_id": None}
    if family == "opt":
        del values["num_key_value_heads"]
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            # Norms, biases and sinks start constant: a forgotten one must show.
            weight.data += 0.1 * torch.randn_like(weight)
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, dtype)) if dtype else model


def make_text(row: Row, seed: int = 1) -> dict[str, Tensor]:
    """Return ids and mask; sequence i of a padded batch starts with `padding` / (i + 1) tokens of it, the last none."""
    batch, tokens, padding = row.text
    if row.model == "demo":
        return {"input_ids": write_facts(tokens), "attention_mask": torch.ones(1, tokens, dtype=torch.long)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(batch - 1):
        ids[i, : padding // (i + 1)] = mask[i, : padding // (i + 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write_facts(tokens: int) -> Tensor:
    """Return lines of code as the demo model knows them, and a question about one of them."""
    words = ("apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "candle")
    lines = [f"{a}_{b} = {17 * i + 23 * j + 11}\n" for i, a in enumerate(words) for j, b in enumerate(words)]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    question = tokenizer("print(tiger_cloud)  # ")["input_ids"]
    text = tokenizer("".join(lines) * 9)["input_ids"][: tokens - len(question)]
    return torch.tensor([text + question])


@functools.cache
def measure_profile(name: str) -> farkv.Profile:
    """Return the profile of a tiny model, measured on two texts of its own."""
    generator = torch.Generator().manual_seed(5)
    return farkv.profile(make_model(name), [torch.randint(1, VOCAB, (160,), generator=generator) for _ in range(2)])


def write_plan(row: Row, path: Path) -> Path:
    """Write the plan file of a row's shares: the file is what stays the same."""
    n_layers = len(next(iter(row.plan.values())))
    levers = {
        name: {"base": 0, "rule": "xkv", "budget": {"ratio": sum(shares) / n_layers}}
        | {key: list(shares) for key in ("shares", "retention", "uniform")}
        for name, shares in row.plan.items()
    }
    identity = measure_profile(row.model).identity
    plan = {"format": "farkv-plan-1", "identity": identity, "layers": list(range(n_layers)), "levers": levers}
    path.write_text(json.dumps(plan))
    return path


# --- ways ---------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """An attached model, and what it is to do."""

    far: Any
    row: Row
    session: Path

    @property
    def model(self) -> Any:
        """Return the model."""
        return self.far.model

    def read(self, seed: int = 1) -> Any:
        """Return a cache that has read a text in one pass."""
        cache = self.far.new_cache(**self.row.cache)
        self.model(input_ids=make_text(self.row, seed)["input_ids"], past_key_values=cache)
        return cache

    def feed(self, cache: Any, ids: Tensor, n: int, mask: Tensor | None = None) -> Played:
        """Feed tokens one by one, then `n` greedy ones; the logits are those of all of them.

        Args:
            mask: of the tokens that were read, where some are padding.
        """
        logits: list[Tensor] = []
        fed = list(ids.split(1, 1))
        while len(logits) < ids.shape[1] + n:
            more: dict[str, Tensor] = {}
            if mask is not None:
                more = {"position_ids": mask.sum(-1, keepdim=True)}
                more["attention_mask"] = mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits.append(self.model(input_ids=fed[len(logits)], past_key_values=cache, **more).logits[:, -1])
            if len(logits) >= ids.shape[1]:
                fed.append(logits[-1].argmax(-1, keepdim=True))
        return Played(torch.cat(fed[ids.shape[1] :], 1).tolist(), logits)


def ask(batch: int = 1, seed: int = 9) -> Tensor:
    """Return a question that is fed token by token."""
    return torch.randint(1, VOCAB, (batch, N_ASKED), generator=torch.Generator().manual_seed(seed))


def add(*parts: Played) -> Played:
    """Return runs one after the other as one."""
    return Played([row for part in parts for row in part.tokens], [step for part in parts for step in part.logits])


def generate(stage: Stage) -> tuple[Played, Any]:
    """Let Hugging Face generate."""
    row, text = stage.row, make_text(stage.row)
    cache = stage.far.new_cache(**row.cache)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **row.generate}
    out = stage.model.generate(**text, past_key_values=cache, return_dict_in_generate=True, **options)
    return Played(out.sequences[:, row.text[1] :].tolist(), list(out.logits)), cache


def resume(stage: Stage) -> tuple[Played, Any]:
    """Ask a saved text."""
    cache = farkv.load_cache(stage.session, stage.model, **stage.row.cache)
    return stage.feed(cache, ask(), NEW_TOKENS), cache


def lengthen(stage: Stage) -> tuple[Played, Any]:
    """Read on after a saved text, save both over it, ask that."""
    first = farkv.load_cache(stage.session, stage.model, **stage.row.cache)
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"][:, :90], past_key_values=first)
    first.save(stage.session)
    return resume(stage)


def save(stage: Stage) -> tuple[Played, Any]:
    """Save what was read under the row's own limits, and ask it."""
    stage.read().save(stage.session)
    return resume(stage)


def crop(stage: Stage) -> tuple[Played, Any]:
    """Answer, take the answer back, ask something else."""
    cache = stage.read()
    first = stage.feed(cache, ask(), 6)
    cache.crop(-8)
    return add(first, stage.feed(cache, ask(seed=3), 6)), cache


def fork(stage: Stage) -> tuple[Played, Any]:
    """Ask one text two questions, each of a copy; the receipt is the second copy's."""
    cache = stage.read()
    first = stage.feed(copy.deepcopy(cache), ask(), 6)
    twin = copy.deepcopy(cache)
    return add(first, stage.feed(twin, ask(seed=3), 6)), twin


def reset(stage: Stage) -> tuple[Played, Any]:
    """Read one text, forget it, read another in the same cache."""
    cache = stage.read()
    first = stage.feed(cache, ask(), 6)
    cache.reset()
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"], past_key_values=cache)
    return add(first, stage.feed(cache, ask(seed=3), 6)), cache


def join(stage: Stage) -> tuple[Played, Any]:
    """Read two texts of different lengths, then answer them as one batch."""
    tokens = stage.row.text[1]
    cache, short = stage.read(), stage.far.new_cache(**stage.row.cache)
    stage.model(input_ids=make_text(stage.row, 2)["input_ids"][:, : tokens // 2], past_key_values=short)
    cache.join(short)
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : tokens - tokens // 2] = 0
    return stage.feed(cache, ask(2), 6, mask), cache


WAYS: dict[str, Callable[[Stage], tuple[Played, Any]]] = {
    way.__name__: way for way in (generate, resume, lengthen, save, crop, fork, reset, join)
}


def write_session(row: Row, path: Path, options: dict[str, Any]) -> None:
    """Save the row's text as it is read without limits."""
    free = {key: value for key, value in options.items() if key in ("quant", "profile", "kernel")}
    with farkv.attach(make_model(row.model), *row.methods, **free) as far:
        Stage(far, row, path).read().save(path)


def play(row: Row, folder: Path) -> Played:
    """Run a row; a refusal leaves the error, and the receipt of the cache that was refused if there was one."""
    options, session, far = dict(row.attach), folder / "text.farkv", None
    if "disk" in options:
        options["disk"] = f"{folder}/pages:{options['disk']}"
    if row.profile:
        options["profile"] = measure_profile(row.model)
    if row.plan:
        options["plan"] = write_plan(row, folder / "plan.json")
    try:
        if row.way in ("resume", "lengthen"):
            write_session(row, session, options)
        with farkv.attach(make_model(row.model), *row.methods, **options) as far:
            played, cache = WAYS[row.way](Stage(far, row, session))
            return played._replace(receipt=far.receipt(cache).to_dict())
    except Exception as error:
        if not isinstance(error, FarKVError):
            traceback.print_exc()
        said = [type(error).__name__, str(error).replace(str(folder), "FOLDER")]
    try:
        receipt = None if far is None else far.receipt().to_dict()
    except CacheStateError:
        receipt = None
    return Played([], [], receipt, said)
