"""One layer's index as tensors: out of a cache and into another, beside another's, never trusted.

In: a layer's index. Out: its tensors by name, as they are saved; or an index made of saved ones, after a look at each.
"""

from __future__ import annotations

import math

import torch

from farkv._axes import Tensor
from farkv.errors import SessionError
from farkv.math.tables import ENTRIES
from farkv.methods.base import Records
from farkv.methods.layer_fit import LayerFit
from farkv.methods.phase import Phase
from farkv.methods.watch import Watch, join_watches, note_shares, rest
from farkv.store.near.index import Projection


def join_fits(fit: LayerFit, other: LayerFit, batches: tuple[int, int], lengths: tuple[int, int]) -> None:
    """Let another's sequences follow these, as far as both are indexed; the rest is indexed when it is next scored.

    Args:
        batches: the sequences of both.
        lengths: the rows of both; the shorter ones get zeros before them.
    """
    pair = list(zip((fit, other), lengths, strict=True))
    known = [(each, n) for each, n in pair if each.index.projection is not None]
    lag = max((n - each.index.length for each, n in known), default=0)
    for each, n in known:
        each.index.rows.cut(n - lag)
    fitted = [*(fit.phase.fitted or [0] * batches[0]), *(other.phase.fitted or [0] * batches[1])]
    samples, strides = join_samples(fit, other, batches)
    fit.index.join(other.index, max(lengths) - lag, batches)
    grown = max(lengths) if fit.phase.grown or other.phase.grown else 0
    watch = join_watches(fit.phase.watch, other.phase.watch, batches)
    fit.phase = Phase(samples, strides, fitted, grown, watch=watch)


def join_samples(fit: LayerFit, other: LayerFit, batches: tuple[int, int]) -> tuple[Tensor | None, list[int] | None]:
    """Return the sampled queries of both, zeros where a sequence needs none any more, and their strides."""
    found = [each.phase.samples for each in (fit, other) if each.phase.samples is not None]
    if not found:
        return None, None
    n_slots = max(sample.shape[2] for sample in found)
    parts: list[Tensor] = []
    strides: list[int] = []
    for each, n_sequences in zip((fit, other), batches, strict=True):
        sample = each.phase.samples
        if sample is None:
            sample = torch.zeros_like(found[0][:1, :, :0]).expand(n_sequences, -1, -1, -1)
        parts.append(torch.nn.functional.pad(sample, (0, 0, 0, n_slots - sample.shape[2])))
        strides += each.phase.strides or [1] * n_sequences
    return torch.cat(parts), strides


def list_tensors(fit: LayerFit, records: Records) -> dict[str, Tensor]:
    """Return a layer's index by name, in host memory."""
    if fit.phase.grown and not fit.phase.unscored:
        # What was read in several passes, and asked nothing yet.
        fit.catch_up(records, records.length)
    found: dict[str, Tensor] = {}
    if fit.index.projection is not None:
        found |= fit.index.projection._asdict()
        found["fitted"] = torch.tensor(fit.phase.fitted)
        if fit.coder.drifts:
            # What is not known is below 0.
            found["share"] = torch.tensor(fit.phase.watch.shares or [math.nan], dtype=torch.float32).nan_to_num(
                nan=-1.0
            )
        if fit.index.length:
            found["codes"] = fit.index.codes()
    if fit.phase.samples is not None:
        found["samples"] = fit.phase.samples
        found["strides"] = torch.tensor(fit.phase.strides)
    return {name: tensor.to("cpu") for name, tensor in found.items()}


def take_tensors(fit: LayerFit, records: Records, mine: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Give an empty index what `list_tensors` returned of one of the same method and text.

    Args:
        dtype: of the text's records.

    Raises:
        SessionError: these tensors are no index of this method and text.
    """
    check_tensors(fit, records, mine, dtype)
    device = fit.place.device
    if "fitted" in mine:
        fit.index.projection = Projection(*(mine[name].to(device) for name in Projection._fields))
        # An index that was made with a profile was final, however few tokens there were: no queries were kept.
        least = 0 if "samples" in mine else fit.count_final(records)
        fitted = mine["fitted"].clamp_min(least).reshape(-1).tolist()
        share = float(mine["share"]) if "share" in mine else -1.0
        known = {0: share if share >= 0 else math.nan}
        fit.phase = Phase(fitted=fitted, watch=note_shares(Watch(), known, fitted, fitted=True))
    if "codes" in mine:
        fit.index.append(mine["codes"].to(device))
    if "samples" in mine:
        fit.phase = fit.phase._replace(samples=mine["samples"].to(device), strides=[int(mine["strides"])])
    n, young = records.length, fit.get_fitted(records)[0] < fit.count_final(records)
    fit.phase = fit.phase._replace(watch=rest(fit.phase.watch, [n], n, [young]))


def check_tensors(fit: LayerFit, records: Records, mine: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise SessionError unless a layer's index is one of this method and text: a file may say anything."""
    names = {*Projection._fields, "fitted"} if "fitted" in mine else set[str]()
    names |= {"samples", "strides"} if "samples" in mine else set()
    names |= {"share"} if fit.coder.drifts and "fitted" in mine else set()
    names |= {"codes"} if "codes" in mine and "fitted" in mine else set()
    why = "" if mine.keys() == names else f"expected {', '.join(sorted(names)) or 'nothing'}, got {', '.join(mine)}"
    if not names:
        why = "it has neither a projection nor queries to make one of"
    for name in sorted(names) if not why else ():
        tensor = mine[name]
        if not (is_of_text(fit, records, name, tensor, dtype) and bool(torch.isfinite(tensor).all())):
            why = why or f"{name} of {list(tensor.shape)}, {tensor.dtype}, is not one of this text"
    if why:
        raise SessionError(f"its index of layer {fit.layer}: {why}; make it anew")


def is_of_text(fit: LayerFit, records: Records, name: str, tensor: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a tensor of an index has the type and sizes that this method and text give it."""
    shape, n_tokens = records.shape, records.length
    heads, dim = shape.kv_heads, shape.k_dim
    size = fit.coder.measure(dim, shape.record_bytes)
    sizes = {"query": (1, heads, dim, size.columns), "key": (1, heads, dim, size.columns), "mean": (1, heads, 1, dim)}
    sizes |= {"tables": (1, heads, ENTRIES * size.nibbles, size.width), "sampled": (1, heads, 1, 1)}
    got = tuple(tensor.shape)
    if name in sizes:
        return got == sizes[name] and tensor.dtype == torch.float32
    if name in ("fitted", "strides"):
        return got == (1,) and tensor.dtype == torch.int64 and 1 <= int(tensor) <= n_tokens
    if name == "share":
        return got == (1,) and tensor.dtype == torch.float32
    if len(got) != 4 or not 0 < got[2] <= n_tokens:
        return False
    if name == "samples":
        return (got[0], got[3], got[1] % heads) == (1, dim, 0) and got[1] > 0 and tensor.dtype == dtype
    # The paper's codes are keys as the model makes them.
    kind, width = (torch.int8, size.nibbles // 2) if size.nibbles else (dtype, size.columns)
    return (got[0], got[1], got[3]) == (1, heads, width) and tensor.dtype == kind
