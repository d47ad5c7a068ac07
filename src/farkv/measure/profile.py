"""Profile a model: run it over calibration prompts and accumulate the moments of its queries and keys.

In: a model, tokenised prompts. Out: a `Profile`. Runs the model's own attention (`measure.mini`); keeps a pair of Gram
matrices per KV head and layer and two gain curves per prompt and layer, nothing per token. Can be resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.calibrate.curves import Curves, fill_layers
from farkv.calibrate.profile import Profile, make_profile
from farkv.config import check_counts, check_flag, check_fraction, check_name, check_window, read_count
from farkv.errors import ConfigError, InputError, ProfileError, UnsupportedModelError
from farkv.hf.attach import attach
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model
from farkv.math.importance import SCORERS, Scorer
from farkv.measure.losses import LEAST_TOKENS, measure_losses
from farkv.measure.mini import Light, Look, PromptSample, draw_runs, run_mini, thin_blocks
from farkv.measure.part import GRAM_PARTS, Part, Sums
from farkv.methods import Full

# Minimum interval between writes of an unfinished measurement.
SECONDS_BETWEEN_WRITES = 5.0


@torch.no_grad()
def profile(
    model: PreTrainedModel,
    prompts: Sequence[Tensor | Sequence[int]],
    *,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
    scorer: Scorer = "window",
    window: int = 8,
    pool: int = 7,
    curves: bool = True,
    resume: str | Path | None = None,
    light: Light | None = None,
    losses: int = 0,
) -> Profile:
    """Measure the skews and the gain curves of every full-attention layer.

    Args:
        model: on its device, not attached.
        prompts: token ids, one sequence each; a few thousand tokens in total are enough for the skew. For the curves
            use at least 20, which end like the prompts that will be used later. Do not calibrate on test data.
        on_prompt: progress callback (prompts done, total); also called at the start when resuming.
        scorer, window, pool: how the records of a curve are scored, the number of last queries used, and the width of
            the moving average along tokens. A prompt of `window` tokens or fewer has no curve.
        curves: False skips them.
        resume: file for an unfinished measurement; a later call with the same prompts and settings resumes from it,
            with a bit-identical result. Deleted on completion.
        light: run a part of the model and of the prompts. The profile then has curves but no skew.
        losses: number of prompts on which to measure the loss of limiting each layer (`measure.losses`); not with
            `light`.

    Raises:
        InputError: there is no prompt of at least two tokens.
        ConfigError: a setting is invalid.
        UnsupportedModelError: the model is not supported.
        ProfileError: `resume` is damaged, or belongs to other prompts, settings or another model.

    Cost: one pass per prompt (`run_mini`), and 2 (Hq + Hkv) D^2 operations per token and layer for the skew.
    """
    look = check_settings(Look(scorer, window, pool, curves, light is None), light)
    losses = read_count("losses", losses)
    if losses and light is not None:
        raise ConfigError(f"losses: expected 0 prompts with light, got {losses}")
    embedding: Any = model.get_input_embeddings()
    rows = [row for i, prompt in enumerate(prompts) if len(row := read_prompt(i, prompt, len(embedding.weight))) > 1]
    if not rows:
        raise InputError("profile: expected at least one prompt of two or more tokens, got none")
    identity, total = identify_model(model), len(rows) + (len(pick_long(rows, losses)) if losses else 0)
    with attach(model, Full(), profile=False) as handle:
        if not handle.managed:
            raise UnsupportedModelError(f"{type(model).__name__}: expected a full-attention layer to measure, got none")
        part = Part(resume, digest_task(rows, look, light, {**identity, "dtype": str(model.dtype)}))
        sums = sum_prompts(handle, rows, part, look, light, on_prompt=lambda done, _: on_prompt(done, total))
        curves_made = make_curves(sums, handle, look, light)
        made = make_profile(dict(sorted(sums.grams.items())), identity, curves_made)
        if losses:
            some = pick_long(rows, losses)
            lost = measure_losses(handle, some, lambda done, _: on_prompt(len(rows) + done, total))
            made = replace(made, limited=lost)
        part.delete()
    return made


def sum_prompts(
    handle: Handle,
    rows: list[Tensor],
    part: Part,
    look: Look,
    light: Light | None,
    *,
    on_prompt: Callable[[int, int], None],
) -> Sums:
    """Run every prompt that the unfinished measurement does not include yet, and add its measurements."""
    with thin_blocks(handle, light.layers if light else 1) as layers:
        sums = part.load()
        if sums.n_done:
            on_prompt(sums.n_done, len(rows))
        try:
            for i in range(sums.n_done, len(rows)):
                ids = rows[i] if light is None else rows[i][draw_runs(rows[i].shape[0], light.tokens, i)]
                sums = add_sample(sums, run_mini(handle, ids, look, layers), rows[i].shape[0], handle.managed)
                part.write(sums, SECONDS_BETWEEN_WRITES)
                on_prompt(sums.n_done, len(rows))
        except BaseException:
            part.write(sums)
            raise
    return sums


def pick_long(rows: list[Tensor], n: int) -> list[Tensor]:
    """Return `n` prompts that are long enough to measure losses on, evenly spaced.

    Raises:
        InputError: none is long enough.
    """
    long = [row for row in rows if row.shape[0] > LEAST_TOKENS]
    if not long:
        raise InputError(f"losses: expected a prompt of more than {LEAST_TOKENS} tokens, got none")
    return long[:: max(1, len(long) // n)][:n]


def read_prompt(i: int, prompt: Tensor | Sequence[int], n_words: int) -> Tensor:
    """Return a prompt's token ids, int64 on the CPU.

    Raises:
        InputError: they are not ids of the model's words.
    """
    try:
        ids = torch.as_tensor(prompt).reshape(-1).to("cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"prompt {i + 1}: expected token ids, got {type(prompt).__name__} ({error})") from error
    if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex()):
        raise InputError(f"prompt {i + 1}: expected token ids, got {ids.dtype}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_words:
        raise InputError(
            f"prompt {i + 1}: expected token ids from 0 to {n_words - 1}, got {int(ids.min())} to {int(ids.max())}; "
            "use this model's tokenizer"
        )
    return ids.long()


def check_settings(look: Look, light: Light | None) -> Look:
    """Return the settings unchanged.

    Raises:
        ConfigError: a setting is invalid, or there is nothing to measure.
    """
    check_name("scorer", look.scorer, SCORERS)
    check_window(look.window, look.pool)
    check_flag(curves=look.curves)
    if light is not None:
        check_fraction(light.tokens, "light: tokens")
        check_counts(1, **{"light: layers": light.layers})
    if light is not None and not look.curves:
        raise ConfigError("light: measures curves only, which curves=False disables; drop one of them")
    return look


def add_sample(sums: Sums, sample: PromptSample, n_tokens: int, layers: list[int]) -> Sums:
    """Return new sums; the old ones stay intact, so that an interruption never leaves half a prompt.

    Args:
        n_tokens: the prompt's length.
        layers: all managed layers; curves of layers that were not run are interpolated.

    Raises:
        ProfileError: a measurement is not finite; nothing was added.
    """
    check_finite(sample, sums.n_done)
    old = sums.grams
    grams = {i: old[i].add(gram) if i in old else gram for i, gram in sample.grams.items()}
    keep, spread, tokens = sums.keep, sums.spread, sums.tokens
    if sample.keep:
        keep = [*keep, fill_layers(sample.keep, tuple(layers))]
        spread = [*spread, fill_layers(sample.spread, tuple(layers))]
        tokens = [*tokens, n_tokens]
    return Sums(sums.n_done + 1, {**old, **grams}, keep, spread, tokens, sample.token_bytes)


def check_finite(sample: PromptSample, n_done: int) -> None:
    """Raise ProfileError where the model computed something that is not finite: it would spoil every sum."""
    for layer in sorted(sample.grams.keys() | sample.keep.keys()):
        gram = sample.grams.get(layer)
        found = [getattr(gram, name) for name in GRAM_PARTS] if gram is not None else []
        found += [rows[layer] for rows in (sample.keep, sample.spread) if layer in rows]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            raise ProfileError(
                f"prompt {n_done + 1}, layer {layer}: expected finite queries and keys, got NaN, infinity or numbers "
                "whose squares overflow; look for NaN in the weights, or load the model in a dtype of more range "
                "(bfloat16, float32)"
            )


def make_curves(sums: Sums, handle: Handle, look: Look, light: Light | None) -> Curves | None:
    """Return the curves of all prompts, or None if there are none.

    Raises:
        InputError: there are none, and `light` measures nothing else.
    """
    if not sums.keep:
        if light is not None:
            raise InputError(f"light: expected a prompt of more than {look.window} tokens, got none; use longer ones")
        return None
    settings: dict[str, Any] = {"scorer": look.scorer, "window": look.window, "pool": look.pool}
    if all(i in sums.token_bytes for i in handle.managed):
        settings["token_bytes"] = [sums.token_bytes[i] for i in handle.managed]
    if light is not None:
        settings["light"] = light._asdict()
    keep, spread = torch.stack(sums.keep), torch.stack(sums.spread)
    return Curves(keep, spread, torch.tensor(sums.tokens), tuple(handle.managed), settings)


def digest_task(rows: list[Tensor], look: Look, light: Light | None, identity: dict[str, str]) -> str:
    """Return a digest of everything that determines the result: prompts, settings, model."""
    digest = hashlib.sha256(json.dumps([look, light, identity], sort_keys=True).encode())
    for row in rows:
        digest.update(save({"ids": row.contiguous()}))
    return digest.hexdigest()
