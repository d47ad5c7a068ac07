"""Train the demo model's byte-level BPE: 2048 tokens, every digit and line end is its own token."""

from __future__ import annotations

from pathlib import Path

from corpus import read_stdlib
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048


def train_tokenizer(out: Path) -> None:
    """Train on the training side of the split and write the tokenizer to `out`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(read_stdlib(held_out=False).values(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.model_max_length = 16384
    fast.save_pretrained(out)


if __name__ == "__main__":
    train_tokenizer(Path(__file__).parent.parent / "src/farkv/demo/model")
