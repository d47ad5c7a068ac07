"""What somebody should know before a text is read: positions that a model has not, a chat template that is missing.

In: a model, its tokenizer, lengths. Out: lines on the log `farkv`, or a refusal.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from farkv.demo import MODEL_PATH
from farkv.errors import InputError
from farkv.hf import _compat

log = logging.getLogger("farkv")


def check_positions(model: PreTrainedModel, n_tokens: int, new_tokens: int) -> None:
    """Say where prompt and answer are longer than a model's context, scaling of its rotary positions included.

    Raises:
        InputError: its positions are a table, which ends there.
    """
    most = getattr(_compat.text_config(model), "max_position_embeddings", None)
    if not isinstance(most, int) or n_tokens + new_tokens <= most:
        return
    words = model.get_input_embeddings()
    # OPT's table has two rows more.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    what = f"{n_tokens:,} tokens of prompt and up to {new_tokens:,} of answer"
    if any(most <= table.num_embeddings <= most + 2 for table in tables):
        raise InputError(
            f"context: {what}, and the model's table of positions has {most:,}; expected no more together: a shorter "
            "text, or fewer new tokens"
        )
    log.warning(
        "context: %s, and the model was made for %s (max_position_embeddings): what is beyond it answers worse, or "
        "not at all", what, f"{most:,}",
    )  # fmt: skip


def check_template(tokenizer: Any) -> None:
    """Say where a question is not put as one; the demo model is asked in code, and has never seen a chat."""
    name = getattr(tokenizer, "name_or_path", "")
    if getattr(tokenizer, "chat_template", None) or name == str(MODEL_PATH):
        return
    log.warning("no chat template: text and question are continued as plain text")
