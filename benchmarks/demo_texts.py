"""The demo model, texts of held-out code for it, and how a cache over them is asked.

In: seeds and lengths. Out: prompts, and the answers or predictions that a cache gives. Whatever the method: a text is
read, then the question and the answer, or known code, go through it token by token.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, NamedTuple

import torch

from farkv import Full, attach
from farkv.demo.filler import STDLIB, draw_filler, read_sources
from farkv.demo.recall import RecallPrompt, make_recall_prompt, question_line
from farkv.engine.bytes_near import count_near
from farkv.evals import prefill as shared
from farkv.evals.prefill import Prefilled
from farkv.hf.ask import Listener, feed, prefill
from farkv.hf.cache import FarCache
from farkv.hf.handle import Handle
from farkv.hf.load import load_model, quiet_libraries
from farkv.hf.prompt import Prompt, build_prompt
from farkv.methods import Method
from farkv.store.sizes import LayerShape

# Of a fact's line, at most, on average.
FACT_TOKENS = 14
FACTS = {1024: 10, 2048: 20, 4096: 30, 8192: 40}
ANSWER_TOKENS = 4
QUESTIONS = 6


class Recall(NamedTuple):
    """A text with facts and one question, in characters and in tokens."""

    made: RecallPrompt
    prompt: Prompt
    answer: list[int]
    sha: str


class Questions(NamedTuple):
    """A text with facts, and questions about several of them, in tokens."""

    text: list[int]
    questions: list[list[int]]
    answers: list[list[int]]
    sha: str


class Demo:
    """The demo model, its tokenizer, and the code that texts are drawn from."""

    def __init__(self) -> None:
        quiet_libraries()
        self.model, self.tokenizer = load_model("demo", device="cpu")
        self.sources = read_sources(STDLIB, held_out=True)
        config: Any = self.model.config
        self.token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens."""
        return self.tokenizer(text)["input_ids"]

    def draw(self, tokens: int, seed: int) -> list[str]:
        """Draw lines; the demo tokenizer never joins lines, so that their tokens add up."""
        return draw_filler(self.sources, tokens, seed, lambda line: len(self.encode(line)))

    def make_recall(self, length: int, n_facts: int, seed: int, spare: int = 20) -> Recall:
        """Make a text of about `length` tokens with one question; `spare` tokens are left for the question."""
        made = make_recall_prompt(self.draw(length - FACT_TOKENS * n_facts - spare, seed), n_facts, seed)
        prompt = build_prompt(self.tokenizer, made.text, made.question)
        return Recall(made, prompt, self.encode(made.answer), digest(made.text + made.question))

    def make_questions(self, length: int, seed: int) -> Questions:
        """Make a text of about `length` tokens, and questions about facts that are spread over it."""
        n_facts = FACTS[length]
        filler = self.draw(length - FACT_TOKENS * n_facts - 20, seed)
        text = make_recall_prompt(filler, n_facts, seed).text
        asked = find_facts(text, filler)[seed % 3 :: n_facts // QUESTIONS][:QUESTIONS]
        prompts = [build_prompt(self.tokenizer, text, question_line(name)) for name, _ in asked]
        tokens = min((p.text for p in prompts), key=len)
        questions = [(p.text + p.question)[len(tokens) :] for p in prompts]
        return Questions(tokens, questions, [self.encode(value) for _, value in asked], digest(text))

    def make_asked(self, drawn: list[tuple[int, int]], n_facts: int) -> list[list[int]]:
        """Return texts that end with their question, of these lengths and seeds."""
        made = [self.make_recall(length, n_facts, seed, spare=FACT_TOKENS).made for length, seed in drawn]
        return [self.encode(one.text + one.question) for one in made]

    def make_code(self, length: int, steps: int, seed: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and those that follow."""
        tokens = self.encode("".join(self.draw(length + steps + 100, seed)))
        return tokens[:length], tokens[length : length + steps]

    def ask_full(self, asked: Questions, chunk: int) -> list[list[int]]:
        """Return the full cache's answers."""
        with attach(self.model, Full()) as far:
            return ask_all(far, read(far, asked.text, chunk), asked.questions)

    def force_full(self, text: list[int], following: list[int], chunk: int) -> torch.Tensor:
        """Return the full cache's predictions, as `force_tokens` does."""
        with attach(self.model, Full()) as far:
            return force_tokens(far, read(far, text, chunk), following)


def digest(text: str) -> str:
    """Return what a row says of its prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_facts(text: str, filler: list[str]) -> list[tuple[str, str]]:
    """Return the facts of a text, name and value, in their order: its lines that are not filler's."""
    rest, facts = iter(filler), []
    following = next(rest, None)
    for line in text.splitlines(keepends=True):
        if line == following:
            following = next(rest, None)
        else:
            name, value = line.strip().split(" = ")
            facts.append((name, value))
    return facts


def find_near_need(model: Any, method: Method, tokens: int, **options: Any) -> tuple[int, LayerShape]:
    """Return the near bytes that decoding over a context needs, and the shape of a layer; options are `attach`'s."""
    config = model.config
    shape = LayerShape(1, config.num_key_value_heads, config.head_dim, config.head_dim, 4)
    with attach(model, method, near="64GiB", **options) as far:
        need, _ = far.new_cache(tokens=tokens).engine.parts.admission.count_join(shape, tokens)
        return count_near(need, tokens, 0, 0).total, shape


def prefill_once(model: Any, tokens: list[int]) -> Prefilled:
    """Run the text densely, in one pass, and keep what each layer saw."""
    return shared.prefill_once(model, [tokens], chunk=len(tokens))


def fill_cache(far: Handle, prefilled: Prefilled, verify: int = 0) -> FarCache:
    """Make a cache that holds a prefilled text, as if this method had read it."""
    return shared.fill_cache(far, prefilled, extra_tokens=256, verify=verify)


def read(far: Handle, text: list[int], chunk: int | None = None, **options: Any) -> FarCache:
    """Read a text in passes of `chunk` tokens; options are those of `new_cache`."""
    cache = far.new_cache(**options)
    prefill(far, cache, text, chunk, Listener())
    return cache


def step(far: Handle, cache: FarCache, tokens: list[int]) -> torch.Tensor:
    """Feed tokens one by one; return the logits after the last, [1, vocabulary]."""
    logits = feed(far, cache, tokens)
    assert logits is not None
    return logits


def answer_greedily(far: Handle, cache: FarCache, question: list[int], n_new: int = ANSWER_TOKENS) -> list[int]:
    """Feed the question token by token and decode greedily."""
    out = [int(step(far, cache, question).argmax(-1))]
    while len(out) < n_new:
        out.append(int(step(far, cache, out[-1:]).argmax(-1)))
    return out


def ask_all(far: Handle, cache: FarCache, questions: list[list[int]]) -> list[list[int]]:
    """Return the answers, each asked of its own copy of the cache."""
    return [answer_greedily(far, copy.deepcopy(cache), question) for question in questions]


def force_tokens(far: Handle, cache: FarCache, tokens: list[int]) -> torch.Tensor:
    """Feed known tokens as decode steps; return the log-probabilities after each, [n, vocabulary]."""
    return torch.cat([step(far, cache, [token]).float().log_softmax(-1) for token in tokens])


def compare_logs(full: torch.Tensor, logs: torch.Tensor) -> tuple[float, float]:
    """Return the KL to the full cache's predictions in nats, and how often the first choice is the same."""
    kl = (full.exp() * (full - logs)).sum(-1)
    return float(kl.mean()), float((full.argmax(-1) == logs.argmax(-1)).float().mean())


def same(found: list[Any], expected: list[Any]) -> list[bool]:
    """Return one by one whether two lists hold the same."""
    return [a == b for a, b in zip(found, expected, strict=True)]
