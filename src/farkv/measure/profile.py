"""Profile a model: run it over calibration prompts and accumulate the moments of its queries and keys.

In: a model, tokenised prompts. Out: a `Profile`. Runs the model's own attention (`measure.mini`); keeps a pair of Gram
matrices per KV head and layer and two gain curves per prompt and layer, nothing per token. Can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from farkv._axes import Tensor
from farkv.calibrate.curves import Curves, fill_layers
from farkv.calibrate.profile import Profile, make_profile
from farkv.errors import ConfigError, InputError, ProfileError, UnsupportedModelError
from farkv.files import pass_file, write_file
from farkv.hf.attach import attach
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model
from farkv.math.importance import SCORERS, Scorer
from farkv.math.skew import Gram
from farkv.measure.losses import LEAST_TOKENS, measure_losses
from farkv.measure.mini import Light, Look, PromptSample, draw_runs, run_mini, thin_blocks
from farkv.methods import Full
from farkv.names import RefusedError, check_ours
from farkv.quote import quote

PART_FORMAT = "farkv-profile-part-1"
# Minimum interval between writes of an unfinished measurement.
SECONDS_BETWEEN_WRITES = 5.0
GRAM_PARTS = ("queries", "keys", "key_sum", "n_keys")


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
    if losses < 0 or (losses and light is not None):
        raise ConfigError(f"losses: expected 0 or more prompts, and 0 with light, got {losses}")
    rows = [torch.as_tensor(p, dtype=torch.long).reshape(-1).to("cpu") for p in prompts]
    rows = [r for r in rows if r.shape[0] > 1]
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


def check_settings(look: Look, light: Light | None) -> Look:
    """Return the settings unchanged.

    Raises:
        ConfigError: a setting is invalid, or there is nothing to measure.
    """
    if look.scorer not in SCORERS:
        raise ConfigError(f"scorer: expected one of {', '.join(SCORERS)}, got {look.scorer!r}")
    if look.window < 1 or look.pool < 1 or look.pool % 2 == 0:
        raise ConfigError(f"expected window >= 1 and an odd pool >= 1, got {look.window} and {look.pool}")
    if light is not None and not (0 < light.tokens <= 1 and light.layers >= 1):
        raise ConfigError(f"light: expected 0 < tokens <= 1 and layers >= 1, got {light.tokens} and {light.layers}")
    if light is not None and not look.curves:
        raise ConfigError("light: measures curves only, which curves=False disables; drop one of them")
    return look


class Sums(NamedTuple):
    """The measurements of the prompts so far: summed moments by layer, and one row of curves ([L, GRID]) per prompt."""

    n_done: int
    grams: dict[int, Gram]
    keep: list[Tensor]
    spread: list[Tensor]
    tokens: list[int]
    token_bytes: dict[int, int]


def add_sample(sums: Sums, sample: PromptSample, n_tokens: int, layers: list[int]) -> Sums:
    """Return new sums; the old ones stay intact, so that an interruption never leaves half a prompt.

    Args:
        n_tokens: the prompt's length.
        layers: all managed layers; curves of layers that were not run are interpolated.
    """
    old = sums.grams
    grams = {i: old[i].add(gram) if i in old else gram for i, gram in sample.grams.items()}
    keep, spread, tokens = sums.keep, sums.spread, sums.tokens
    if sample.keep:
        keep = [*keep, fill_layers(sample.keep, tuple(layers))]
        spread = [*spread, fill_layers(sample.spread, tuple(layers))]
        tokens = [*tokens, n_tokens]
    return Sums(sums.n_done + 1, {**old, **grams}, keep, spread, tokens, sample.token_bytes)


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


class Part:
    """The file of an unfinished measurement; does nothing without a path."""

    def __init__(self, path: str | Path | None, digest: str):
        self.path = None if path is None else Path(path)
        self.digest = digest
        self._written = time.monotonic()

    def load(self) -> Sums:
        """Return the sums so far.

        Raises:
            ProfileError: the file is damaged or belongs to another measurement.
        """
        if self.path is None:
            return Sums(0, {}, [], [], [], {})
        try:
            # Others may know where it will be: what it says would become the profile.
            check_ours(self.path)
            with pass_file(self.path) as name, safe_open(name, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            if about.get("format") == PART_FORMAT and about.get("digest") == self.digest:
                return unpack_sums(tensors, json.loads(about["sums"]))
        except FileNotFoundError:
            return Sums(0, {}, [], [], [], {})
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            why = error.strerror if isinstance(error, RefusedError) else f"cannot be read ({error})"
            raise ProfileError(f"resume {quote(self.path)}: {why}; delete it to start over") from error
        raise ProfileError(
            f"resume {quote(self.path)}: expected an unfinished profile of these prompts, settings and model, "
            "got another; delete it to start over, or repeat the original call"
        )

    def write(self, sums: Sums, pause: float = 0.0) -> None:
        """Write the sums unless the last write was less than `pause` seconds ago; the file is replaced atomically."""
        if self.path is None or sums.n_done == 0 or time.monotonic() - self._written < pause:
            return
        tensors, about = pack_sums(sums)
        metadata = {"format": PART_FORMAT, "digest": self.digest, "sums": json.dumps(about)}
        # Not for others, so that it is known on resuming who wrote it.
        write_file(self.path, save(tensors, metadata), "profile", private=True)
        self._written = time.monotonic()

    def delete(self) -> None:
        """Delete the file: the measurement is complete."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()


def pack_sums(sums: Sums) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sums as named tensors and a dict of the rest."""
    tensors = {f"{i}.{name}": getattr(gram, name) for i, gram in sums.grams.items() for name in GRAM_PARTS}
    if sums.keep:
        tensors |= {"keep": torch.stack(sums.keep), "spread": torch.stack(sums.spread)}
    about = {
        "n_done": sums.n_done,
        "layers": sorted(sums.grams),
        "tokens": sums.tokens,
        "token_bytes": sums.token_bytes,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, about


def unpack_sums(tensors: dict[str, Tensor], about: dict[str, Any]) -> Sums:
    """Restore the sums from `pack_sums`."""
    grams = {i: Gram(*(tensors[f"{i}.{name}"] for name in GRAM_PARTS)) for i in about["layers"]}
    n_curves = len(about["tokens"])
    keep, spread = (list(tensors[name]) if n_curves else [] for name in ("keep", "spread"))
    sizes = {int(i): n for i, n in about["token_bytes"].items()}
    return Sums(about["n_done"], grams, keep, spread, about["tokens"], sizes)
