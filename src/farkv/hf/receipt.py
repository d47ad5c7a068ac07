"""Turn what a cache counted into a receipt. In: model, method, limits, a cache. Out: a frozen `Receipt`."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
from transformers import PreTrainedModel

from farkv.account import Account
from farkv.config import LEVERS
from farkv.engine.build import Roles
from farkv.engine.least import Least, describe_crossover, find_least
from farkv.engine.setup import Setting
from farkv.engine.usage import Usage, count_holding, count_usage, find_exact
from farkv.hf import _compat
from farkv.hf.cache import FarCache
from farkv.hf.layer import FarLayer
from farkv.hf.rss import measure_rss
from farkv.methods.full import Full
from farkv.methods.table import Method, find_name
from farkv.receipt import KVBytes, LayerRow, Limits, Quality, Quant, Receipt, Times, Weights
from farkv.store.records import StoreLimits


def name_method(method: Method, roles: Roles, setting: Setting) -> str:
    """Return the method's name as on the command line; the published variant, and a plan's levers, are named."""
    name = find_name(method)
    if getattr(method, "paper", False):
        name += "-paper"
    if roles.selects is None:
        return name
    levers = setting.levers
    drives = {"keep": roles.keeps, "near": levers.near is not None, "fetch": levers.fetch is not None}
    pulled = [lever for lever in LEVERS if drives[lever]]
    return f"{name}+xkv({','.join(pulled)})" if pulled else name


def make_receipt(
    model: PreTrainedModel, roles: Roles, setting: Setting, layer_types: list[str], kernel: str, cache: FarCache
) -> Receipt:
    """Read the counters (one device sync) and fill in the receipt."""
    account, usage = cache.account, count_usage(cache.engine)
    sizes, kept = ([count(layer) for layer in cache.layers] for count in (count_layer_bytes, count_kept_bytes))
    total, managed = sum(sizes), cache.engine.layers
    managed_total, least = sum(sizes[i] for i in managed), measure_least(cache, sizes)
    steps = max(1, account.decode_steps)
    return Receipt(
        model=str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        weights=describe_weights(model),
        device=str(cache.engine.setup.device),
        threads=torch.get_num_threads(),
        method=name_method(roles.selects or roles.evicts or Full(), roles, setting),
        fraction_asked=getattr(roles.selects or roles.evicts, "fraction", None),
        answer="",
        stop_reason=account.stop_reason,
        context_tokens=account.context_tokens,
        session_tokens=account.session_tokens,
        generated_tokens=account.generated_tokens or account.decode_steps,
        rss=measure_rss(model),
        kv_bytes=KVBytes(
            total=total,
            near_peak=usage.near_records + usage.index_bytes,
            host_peak=usage.host,
            disk_peak=usage.disk,
            index_peak=usage.index_bytes,
        ),
        limits=make_limits(setting.limits),
        read_fraction=account.read_fraction(),
        index_fraction=account.index_fraction(),
        resident_fraction=min(1.0, usage.near_records / total) if total else 0.0,
        kept_fraction=sum(kept) / total if total else 1.0,
        managed_read_fraction=account.read_fraction(managed),
        managed_resident_fraction=min(1.0, usage.near_records / managed_total) if managed_total else 0.0,
        managed_kept_fraction=sum(kept[i] for i in managed) / managed_total if managed_total else 1.0,
        least_read_fraction=least.fraction,
        peak_read_fraction=max(account.peak_read, account.read_fraction()),
        exact=find_exact(cache.engine),
        notes=list_notes(cache, setting, least),
        fetched_bytes_per_token=account.fetched_bytes / steps,
        disk_bytes_per_token=account.disk_bytes / steps,
        evicted_records=sum(count_evicted(layer) for layer in cache.layers),
        kernel=kernel,
        fallbacks=dict(account.fallbacks),
        quant=make_quant(usage),
        time=make_times(account),
        quality=make_quality(account),
        drafts=account.drafts.describe(),
        layers=tuple(make_row(i, cache, layer_types[i]) for i in range(len(cache.layers))),
        versions={
            "farkv": version("farkv"),
            "torch": torch.__version__,
            "transformers": _compat.version,
            "python": platform.python_version(),
        },
    )


def list_notes(cache: FarCache, setting: Setting, least: Least) -> tuple[str, ...]:
    """Return what a reader must know besides: of the cap, of the crossover, of records that travel, and of latents."""
    engine = cache.engine
    late = engine.selector.note if engine.store.travels else ""
    notes = [least.note, describe_crossover(engine, cache.get_seq_length()), late]
    if setting.latents:
        notes.append(
            f"{len(setting.latents)} of {len(engine.layers)} managed layers store latents: what a step reads of them "
            "is expanded and read by the model's own attention, by no kernel in place"
        )
    return tuple(filter(None, notes))


def describe_weights(model: PreTrainedModel) -> Weights:
    """Return what a model computes in, and what its weights were made from, if `load_model` or transformers say it."""
    source = getattr(model, "farkv_source", None) or _compat.name_quantization(model)
    return Weights(str(model.dtype).removeprefix("torch."), source)


def measure_least(cache: FarCache, sizes: list[int]) -> Least:
    """Return the least that a step reads of a cache's context, of which every layer holds so many bytes."""
    managed = {i: sizes[i] for i in cache.engine.layers}
    others = {i: n for i, n in enumerate(sizes) if i not in managed}
    return find_least(cache.engine, cache.get_seq_length(), managed, others)


def make_limits(limits: StoreLimits) -> Limits:
    """Return the limits that were set."""
    return Limits(limits.near, limits.host, None if limits.disk is None else limits.disk.ledger.limit)


def make_quant(usage: Usage) -> Quant:
    """Return how records are stored in each tier, and the largest error of any of their values."""
    if usage.quant is None:
        return Quant()
    return Quant(host=usage.quant, disk=usage.quant if usage.on_disk else None, max_error=usage.max_error)


def make_times(account: Account) -> Times:
    """Return the seconds inside forward passes, the decode rate they give, and those by the clock."""
    rate = account.timed_steps / account.decode_s if account.decode_s else 0.0
    return Times(
        prefill_s=account.prefill_s,
        decode_s=account.decode_s,
        tokens_per_s=rate,
        first_token_s=account.first_token_s if account.has_answered or account.generated_tokens else None,
        total_s=account.total_s,
    )


def make_quality(account: Account) -> Quality | None:
    """Return the comparison with full attention; None if nothing was verified."""
    if not account.kl:
        return None
    counts = [c for c in account.layers.values() if c.mass_steps]
    steps = sum(c.mass_steps for c in counts)
    return Quality(
        steps=len(account.kl),
        top1_agreement=sum(account.agreements) / len(account.agreements),
        kl_mean=sum(account.kl) / len(account.kl),
        mass_mean=sum(c.mass_sum for c in counts) / steps if steps else 1.0,
        mass_min=min((c.mass_min for c in counts), default=1.0),
    )


def count_layer_bytes(layer: object) -> int:
    """Return the KV bytes that a full cache holds of a layer: as stored for ours, as held for unmanaged ones."""
    if isinstance(layer, FarLayer):
        held = count_holding(layer.engine, layer.layer)
        return (held.kept + held.evicted) * held.record_bytes
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def count_kept_bytes(layer: object) -> int:
    """Return the KV bytes that are held of a layer now; of an unmanaged layer, all of them."""
    if not isinstance(layer, FarLayer):
        return count_layer_bytes(layer)
    held = count_holding(layer.engine, layer.layer)
    return held.kept * held.record_bytes


def count_evicted(layer: object) -> int:
    """Return how many records of a layer were evicted, all sequences and KV heads."""
    return count_holding(layer.engine, layer.layer).evicted if isinstance(layer, FarLayer) else 0


def make_row(i: int, cache: FarCache, layer_type: str) -> LayerRow:
    """Return one layer's row."""
    managed = isinstance(cache.layers[i], FarLayer)
    count = cache.account.layer(i)
    read = count.total_read() / count.held if count.held else 0.0
    total = count_layer_bytes(cache.layers[i])
    kept = count_kept_bytes(cache.layers[i]) / total if total else 1.0
    why = None if managed else f"{layer_type}: left to Hugging Face's own cache layer"
    return LayerRow(
        layer=i, managed=managed, why=why, read_fraction=read, kept_fraction=kept, mass_mean=count.mass_mean()
    )
