"""Format a sample's questions for one model: in code, as a completion, in its chat template, or begun for it."""

from __future__ import annotations

from typing import Any

from farkv.errors import ConfigError, InputError
from farkv.evals.sample import Sample, Turn
from farkv.hf.prompt import Prompt, build_prompt

# code: the demo model's tasks and questions.  completion: in words, for a base model: the prompt ends where the value
# starts.  chat: the chat template.  prefix: the chat template, and the answer is begun as RULER begins it.
FORMS = ("auto", "code", "completion", "chat", "prefix")
# A chat model of fewer parameters gets its answers begun.
SMALL = 2_000_000_000
# Placeholder for the previous answer when a chat template is rendered.
_ANSWER = "farkv-answer-7c3e"


def check_form(form: str) -> None:
    """Raise ConfigError unless this is a form."""
    if form not in FORMS:
        raise ConfigError(f"--form: expected {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")


def choose_form(form: str, model: str, tokenizer: Any, n_parameters: int) -> str:
    """Return the form for a model: the demo's is code, a base model's completion, a small chat model's prefix.

    Raises:
        ConfigError: the form is unknown.
        InputError: it needs a chat template and there is none.
    """
    check_form(form)
    chats = bool(getattr(tokenizer, "chat_template", None))
    if form in ("chat", "prefix") and not chats:
        raise InputError(f"--form {form}: the tokenizer has no chat template; use --form completion")
    if form != "auto":
        return form
    if model == "demo":
        return "code"
    return "completion" if not chats else "prefix" if n_parameters < SMALL else "chat"


class Prompter:
    """Formats questions for one model.

    Args:
        tokenizer: the model's.
        form: one of `FORMS` but auto.
    """

    def __init__(self, tokenizer: Any, form: str = "code"):
        self.tokenizer, self.form = tokenizer, form
        self.chats = form in ("chat", "prefix")
        self._newlines: dict[int, bool] = {}

    def build(self, sample: Sample) -> Prompt:
        """Return the tokens of the text and of the first question (for `ppl`, of the continuation)."""
        if sample.continuation:
            whole = self.tokenizer(sample.text + sample.continuation, return_offsets_mapping=True)
            ids, ends = whole["input_ids"], whole["offset_mapping"]
            cut = next(i for i, (_, stop) in enumerate(ends) if stop > len(sample.text))
            return Prompt(list(ids[:cut]), list(ids[cut:]))
        question = sample.turns[0]
        if self.chats:
            prompt = build_prompt(self.tokenizer, sample.text, question.instruction)
            return Prompt(prompt.text, prompt.question + self.begin(question))
        # Special tokens at the beginning belong to the text only, not to the question.
        return Prompt(list(self.tokenizer(sample.text)["input_ids"]), self.encode(question.completion))

    def list_tokens(self, sample: Sample) -> dict[str, Any]:
        """Return all that a sample alone is fed, in order, for programs that answer the same prompts.

        Returns:
            The text's tokens; turn by turn the question's, what ends the answer before it included, and the right
            answer's; or the continuation's.
        """
        prompt = self.build(sample)
        if sample.continuation:
            return {"text": prompt.text, "turns": [], "continuation": prompt.question}
        questions = [prompt.question, *(self.line_end + self.follow(turn) for turn in sample.turns[1:])]
        turns = [
            {"question": question, "answer": self.encode_answer(turn)}
            for question, turn in zip(questions, sample.turns, strict=True)
        ]
        return {"text": prompt.text, "turns": turns, "continuation": []}

    def begin(self, turn: Turn) -> list[int]:
        """Return the tokens that an answer is begun with."""
        return self.encode(turn.prefix) if self.form == "prefix" and turn.prefix else []

    def encode(self, text: str) -> list[int]:
        """Tokenise text that follows other text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_answer(self, turn: Turn) -> list[int]:
        """Return the tokens of the right answer, as they follow the question; empty if there is none."""
        begun = not self.chats or self.begin(turn)
        return self.encode(turn.answer if begun else turn.answer.lstrip())

    def follow(self, turn: Turn) -> list[int]:
        """Return the tokens that follow an answer's last token, up to and including the next question."""
        if not self.chats:
            return self.encode(turn.completion)
        asked = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": turn.instruction},
        ]
        frame = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return self.encode(frame[frame.index(_ANSWER) + len(_ANSWER) :]) + self.begin(turn)

    @property
    def line_end(self) -> list[int]:
        """The tokens that end an answer where no template does."""
        return [] if self.chats else self.encode("\n")

    def limit(self, turn: Turn) -> int:
        """Return the token limit of an answer: a third more than the correct one's length, plus a few."""
        n = len(self.encode_answer(turn))
        return n + n // 3 + (32 if self.form == "chat" else 4)

    def ends(self, token: int, stops: set[int]) -> bool:
        """Return whether this token ends an answer: the model's own end, and of one that was begun the line's."""
        if token in stops:
            return True
        if self.form == "chat":
            return False
        if token not in self._newlines:
            self._newlines[token] = "\n" in self.tokenizer.decode([token])
        return self._newlines[token]
