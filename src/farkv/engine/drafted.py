"""A pass that reads several tokens of an answer at once: guesses of a smaller model, or of the prompt's own words.

In: a step of several tokens. Out: one output per part: the prompt's tokens densely, each token of the answer by its own
choice, exactly as if it had come alone, seeing only what is before it. All linear maps of the model still ran once.
"""

from __future__ import annotations

from itertools import pairwise

from farkv._axes import Tensor
from farkv.engine.step import Engine
from farkv.math.step import AttentionFunction, Query, Step


def attend_drafted(engine: Engine, layer: int, step: Step, attention: AttentionFunction) -> list[object]:
    """Store and attend to the tokens of a pass part by part; return the outputs in order.

    Cost: a choice per token of the answer; where records travel each waits for its own fetch, estimated ahead is none.
    """
    account, n_before = engine.account, engine.count_tokens(layer)
    n_steps, n_dense = account.pass_steps, step.n_new - engine.mode.drafted
    outputs: list[object] = []
    for start, stop in pairwise(sorted({0, *range(n_dense, step.n_new + 1)})):
        part = cut_step(step, start, stop, n_before)
        is_dense = stop <= n_dense
        account.decoding, account.pass_steps = not is_dense, 0 if is_dense else n_steps
        if is_dense:
            # It takes the near memory that the steps of the layer before had.
            engine.store.buffers.clear()
        elif engine.selector.source is not None:
            account.add_fallback("own_query")
        engine.store.append(layer, part.k, part.v)
        outputs.append(engine.attend(layer, part, attention))
    account.decoding = not n_dense
    return outputs


def cut_step(step: Step, start: int, stop: int, n_before: int) -> Step:
    """Return the step of a pass's tokens from `start` to `stop`, of a context that had `n_before` tokens.

    A deliberate sync where there is a mask: assisted decoding waits for the device after every pass anyway.
    """
    rows = slice(start, stop)
    mask = None if step.mask is None else step.mask[:, :, rows, : n_before + stop]
    if mask is not None and stop - start == 1 and bool(mask.all()):
        # What comes alone has no mask.
        mask = None
    q, k, v = (cut_tokens(part, rows) for part in (step.query.q, step.k, step.v))
    return Step(Query(q, step.query.logits), k, v, mask)


def cut_tokens(part: Tensor, rows: slice) -> Tensor:
    """Return some tokens of [B, H, T, D] as they would come alone."""
    return part[:, :, rows].contiguous()
