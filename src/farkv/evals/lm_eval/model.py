"""The harness's model: every request has its own cache, which all scored and generated tokens read.

In: the harness's requests. Out: the same as its Hugging Face model returns; at `fraction=1`, equal up to rounding.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports] - an extra
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from farkv.errors import ConfigError, InputError
from farkv.evals.lm_eval.arguments import open_model, parse_arguments
from farkv.evals.lm_eval.score import score_continuations, score_window
from farkv.evals.lm_eval.tally import Tally
from farkv.hf.ask import Listener, prefill

ONE_SEQUENCE = ("num_beams", "num_return_sequences")


@register_model("farkv")
class FarKVLM(TemplateLM):
    """The model of `--model farkv`; `--model_args` are those of `Arguments`."""

    backend = "causal"

    def __init__(self, **given: Any):
        super().__init__()
        self.arguments = parse_arguments(given)
        self.far, self.tokenizer = open_model(self.arguments)
        self.model = self.far.model
        self._device = self.far.device
        self.tally = Tally(self.arguments.is_sparse)
        # The harness never closes the model, but a disk store must be released.
        weakref.finalize(self, self.far.detach)

    # --- properties that the harness reads ------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token that precedes a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Return the maximum number of tokens of a request."""
        return self.arguments.max_length or resolve_max_length(self.model.config, self.tokenizer)

    @property
    def batch_size(self) -> int:
        """Return 1."""
        return 1

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which the harness caches its requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries for the harness's results: the method, and what was read."""
        config = {"method": self.arguments.method, "config": repr(self.far.method), **self.tally.to_dict()}
        parameters = self.model.num_parameters()
        return {"model_num_parameters": parameters, "model_dtype": str(self.model.dtype), "farkv": config}

    # --- text and tokens ------------------------------------------------------------------------------------

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text; no prefix token is added if the text already begins with it."""
        return self._encode(string, add_special_tokens, self.tokenizer.decode([self.prefix_token_id]))

    def _encode(self, string: str, special: bool | None, prefix: str | None) -> list[int]:
        if special is None and prefix and string.startswith(prefix):
            special = False
        elif special is None:
            special = self.arguments.add_bos_token
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the chat template; system messages are dropped if it does not support them."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    # --- log-likelihoods ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; those with the same context use one prefill."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for n, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple(self._cut(context, continuation)), []).append(n)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="farkv loglikelihood")
        for context, members in groups.items():
            continuations = [requests[n][2] for n in members]
            scores = score_continuations(self.far, list(context), continuations, copies=self.arguments.copies)
            for n, scored in zip(members, scores, strict=True):
                self.tally.add(scored.account)
                answers[n] = scored.logprob, scored.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[n][0], answers[n])
                bar.update(1)
        bar.close()
        self._report()
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the end of the context that fits together with a continuation."""
        room = self.max_length + 1 - len(continuation)
        if not context or not continuation or room < 1:
            raise InputError(
                f"loglikelihood: expected a context and a continuation of 1 to {self.max_length} tokens, got "
                f"{len(context)} and {len(continuation)}; raise max_length, or use another task"
            )
        return context[-room:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in the harness's windows; each window has its own cache."""
        totals: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm, desc="farkv rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score_window(pair) for pair in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        self._report()
        return totals

    def _score_window(self, pair: tuple[list[int], list[int]]) -> float:
        prompt, tokens = make_disjoint_window(pair)
        n_prefill = int(self.arguments.rolling_prefill * (len(prompt) + len(tokens) - 1))
        scored = score_window(self.far, prompt, tokens, n_prefill)
        self.tally.add(scored.account, scored.n_dense)
        return scored.logprob

    # --- generation -----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, greedily unless the task samples."""
        answers: list[str] = []
        for request in tqdm(requests, disable=disable_tqdm, desc="farkv generate"):
            context, options = request.args
            answers.append(self._generate(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        self._report()
        return answers

    @torch.no_grad()
    def _generate(self, context: str, given: dict[str, Any]) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.arguments.max_gen_toks))
        until = handle_stop_sequences(
            options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        )
        n_new = options.pop("max_gen_toks")
        ids = self._encode(context, None, self.tokenizer.bos_token)[-self._room(n_new) :]
        if not ids:
            raise InputError("generate_until: expected a context of at least one token, got an empty one")
        n_new = options.pop("max_length", len(ids) + n_new) - len(ids)
        cache = self.far.new_cache(tokens=len(ids) + n_new)
        prefill(self.far, cache, ids[:-1], None, Listener())
        tokens = torch.tensor([ids], device=self.far.device)
        generate: Any = self.model.generate
        out = generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=n_new,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(ids), 1),
            pad_token_id=self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **settle_sampling(options),
        )
        self.tally.add(cache.account)
        answer = self.tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
        return postprocess_generated_text(answer, until, None)

    def _room(self, n_new: int) -> int:
        room = self.max_length - n_new
        if room < 1:
            raise InputError(
                f"generate_until: expected fewer than {self.max_length} tokens to generate, the model's length, got "
                f"{n_new}; lower max_gen_toks, or raise max_length"
            )
        return room

    def _report(self) -> None:
        sys.stderr.write(f"farkv {self.arguments.method}: {self.tally}\n")


def settle_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Return the generation options of a single sequence; greedy decoding has no temperature.

    Raises:
        ConfigError: more than one sequence is requested.
    """
    for name in ONE_SEQUENCE:
        if options.get(name, 1) != 1:
            raise ConfigError(f"gen_kwargs: {name} expected 1, got {options[name]!r}; a cache holds one sequence")
    if not options.get("do_sample"):
        return {**options, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options
