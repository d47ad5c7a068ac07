"""Attach a method to an unmodified model. In: what the user chose. Out: a checked `Handle`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import PreTrainedModel

from farkv.calibrate.crossover import RecordShape, choose_crossover
from farkv.calibrate.plan import Plan
from farkv.calibrate.profile import Profile, find_beside
from farkv.calibrate.skews import HeadForm
from farkv.config import KERNELS, check_flag, check_name, check_storage, parse_bytes, parse_disk
from farkv.engine.build import Roles
from farkv.engine.setup import Kernels, Levers, Setting
from farkv.errors import CacheStateError, ConfigError
from farkv.hf import _compat
from farkv.hf.attention import NAME
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model
from farkv.kernels.gpu import Gpu, load_gpu
from farkv.kernels.native import load_native
from farkv.methods import XKV, Full, Indexer, InfiniGen, Method
from farkv.methods.table import evicts
from farkv.store.far.page_file import DiskSpace
from farkv.store.records import StoreLimits
from farkv.store.shared import Shared
from farkv.store.sizes import Allowed
from farkv.store.worker import Worker

log = logging.getLogger("farkv")


def attach(
    model: PreTrainedModel,
    *methods: Method,
    near: int | str | None = None,
    host: int | str | None = None,
    disk: str | None = None,
    evict: str = "refuse",
    quant: str | None = None,
    kernel: str = "auto",
    profile: Profile | str | Path | bool | None = None,
    plan: Plan | str | Path | None = None,
    check: bool = True,
    every_generate: bool = True,
) -> Handle:
    """Let a model decode from a far KV store.

    Args:
        model: any decoder-only model on one device that routes attention through the attention interface.
        methods: one method's config, InfiniGen() if none is given; XKV may stand beside a selector.
        near: limit of near memory, all caches together, in bytes or as text ("2GiB"): a GPU's memory, or on a CPU a
            counted allocation of its own. None on a CPU: the pool itself is near memory.
        host: limit of host memory, all caches together. Without a near limit on a CPU, index and buffers count too.
        disk: folder and limit, "DIR:100GiB": every full page of records goes there, host memory holds copies.
        evict: what goes when the pool is full: "refuse" (nothing: the context is refused), "fifo", "lru", "counter"
            (InfiniGen's), "clock" or "score". With a disk a copy goes and nothing is lost ("refuse": the longest
            unused); without one the records are gone, and the receipt counts them.
        quant: store records as "int8" or "int4" in host memory and on disk; None: as the model made them.
        kernel: "auto" runs the fast kernels of this machine where a choice of records is read, "native" also where
            everything is (then equal to the plain model to rounding, not bit for bit), "plain" nowhere. The receipt
            says which ran.
        profile: a profile or its path. None: the one beside the model's weights, if there is one; False: none,
            the skew is then estimated from each prompt.
        plan: a plan or its path. With XKV it drives XKV's levers; without, what a selector may fetch per layer.
        check: send seven tokens through the model before and after, once per class and configuration: what cannot be
            managed is refused now, not answered wrongly later.
        every_generate: give a `model.generate` without `past_key_values` a new cache, which is gone when the call is
            over; its receipt stays. False: only calls with a cache of `new_cache()` are managed.

    Raises:
        UnsupportedModelError: this architecture or attention implementation cannot be managed.
        ConfigError: an option's value cannot be used.
        StoreError: the disk's folder cannot be used, or is in use.
        ProfileError, PlanError: the file is damaged or of another model.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model: expected a model of transformers, got {model!r:.80}; load it first, for example by "
            "transformers.AutoModelForCausalLM.from_pretrained(...)"
        )
    limits = StoreLimits(parse_bytes(near, "near"), parse_bytes(host, "host"), evict=evict, quant=quant)
    limits = limits._replace(shared=Shared(limits.near, limits.host))
    check_storage(evict, quant, host=limits.host)
    check_flag(check=check, every_generate=every_generate)
    kernels = find_kernels(kernel, model)
    place = parse_disk(disk, "disk")
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME:
        raise CacheStateError("attach: the model is attached already; detach it first")
    loaded_plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
    if loaded_plan is not None and not isinstance(loaded_plan, Plan):
        raise ConfigError(f"plan: expected a Plan or its path, got {type(plan).__name__}")
    roles = choose_methods(methods, loaded_plan)
    levers = make_levers(roles, loaded_plan)
    check_levers(roles, levers, limits, has_disk=place is not None)
    loaded = find_profile(model, profile)
    if loaded is not None:
        loaded.check(identify_model(model))
    if place is not None:
        limits = limits._replace(disk=DiskSpace(*place))
    try:
        handle = Handle(
            model, roles, Setting(limits, loaded, levers, kernels, worker=Worker()), looks=check, lends=every_generate
        )
    except BaseException:
        if limits.disk is not None:
            limits.disk.close()
        raise
    try:
        check_files(handle, loaded, loaded_plan)
        say_least(handle)
    except BaseException:
        handle.detach()
        raise
    return handle


def check_files(handle: Handle, profile: Profile | None, plan: Plan | None) -> None:
    """Raise ProfileError or PlanError unless a profile and a plan fit the layers of an attached model.

    Cost: with a profile of skews, one token through the model, which shows every layer's form exactly.
    """
    if profile is not None and profile.has_skew and handle.managed:
        handle.measure_shape()
        profile.check_layers({i: HeadForm(shape.kv_heads, shape.k_dim) for i, shape in handle.shapes.items()})
    if plan is not None:
        plan.check(identify_model(handle.model), handle.managed)


def say_least(handle: Handle) -> None:
    """Say it where a cap cannot be kept to, however long the context: `find_least` says it of a given length.

    Cost: of a hybrid model, one token through it, which shows what its other layers hold.
    """
    tokens = getattr(_compat.text_config(handle.model), "max_position_embeddings", None)
    asked = getattr(handle.method, "fraction", None)
    if not handle.unmanaged_kinds or not isinstance(tokens, int) or asked is None:
        return
    least = handle.find_least(tokens)
    if least.fraction > asked:
        log.warning("%s, at %s tokens: %s", type(handle.model).__name__, f"{tokens:,}", least.note)


def find_kernels(kernel: str, model: PreTrainedModel) -> Kernels:
    """Return the fast kernels for the device that a model is on.

    Raises:
        ConfigError: the name is not known, or native kernels were asked for and there are none.
    """
    check_name("kernel", kernel, KERNELS)
    if kernel == "plain":
        return Kernels()
    kernels = load_gpu() if model.device.type == "cuda" else load_native() if model.device.type == "cpu" else None
    if kernels is None and kernel == "native":
        raise ConfigError(
            f"kernel: there are no fast kernels for {model.device.type} here; on a CPU install a C compiler and farkv "
            'again, on a GPU install triton, or use kernel="auto"'
        )
    if kernels is None or isinstance(kernels, Gpu):
        # A GPU's records are far: reading all of them is never the faster way.
        return Kernels(kernels, kernel == "native")
    return Kernels(kernels, kernel == "native", *choose_crossover(kernels.name, find_record_shape(model)))


def find_record_shape(model: PreTrainedModel) -> RecordShape:
    """Return the shape of a model's records, as its configuration says; it decides how long contexts are read whole."""
    kv_heads, head_dim, groups = _compat.describe_heads(_compat.text_config(model))
    return RecordShape(kv_heads, head_dim, groups, str(model.dtype).removeprefix("torch."))


def choose_methods(methods: tuple[Method, ...], plan: Plan | None) -> Roles:
    """Return what selects and what evicts among the methods that were given."""
    xkv = [m for m in methods if isinstance(m, XKV)]
    others = [m for m in methods if not isinstance(m, XKV)]
    if len(xkv) > 1 or len(others) > 1:
        names = ", ".join(type(m).__name__ for m in methods)
        raise ConfigError(f"attach: expected one method, or XKV beside one selector; got {names}")
    method = others[0] if others else None
    if method is not None and evicts(method):
        if xkv or plan is not None:
            name = type(method).__name__
            raise ConfigError(f"{name}: evicts by a rule of its own, so it takes no XKV and no plan; use it alone")
        return Roles(None, method, keeps=True)
    if isinstance(method, Full) and (xkv or plan is not None):
        raise ConfigError("Full: reads everything, so it takes no XKV and no plan; use XKV alone, or a selector")
    if isinstance(method, Indexer) and (xkv or plan is not None):
        raise ConfigError("Indexer: the model chooses among all records, so it takes no XKV and no plan; use fraction")
    if not xkv:
        return Roles(method or InfiniGen())
    levers = xkv[0].levers
    if method is None and levers != ("keep",):
        raise ConfigError(
            f"levers: {', '.join(levers)} without a selector; only keep works alone: add a selector, for "
            "example attach(model, XKV(...), InfiniGen(), plan=...)"
        )
    if plan is None and levers != ("keep",):
        raise ConfigError(f"levers: {', '.join(levers)} are driven by a plan; give one: attach(..., plan=...)")
    if plan is not None and (xkv[0].has_budget or xkv[0].rule != "xkv"):
        raise ConfigError(
            "XKV: the plan says how much each layer keeps; leave out fraction, retention, tokens and rule"
        )
    return Roles(method, xkv[0], keeps="keep" in levers)


def make_levers(roles: Roles, plan: Plan | None) -> Levers:
    """Return what a plan limits in each layer: XKV's levers, or what a selector may fetch."""
    if plan is None:
        return Levers()
    names = roles.evicts.levers if isinstance(roles.evicts, XKV) else ("fetch",)
    kept = None
    if "keep" in names:
        keep = plan.get("keep")
        kept = {i: Allowed(keep.base, share) for i, share in zip(plan.layers, keep.shares, strict=True)}
    fetch = dict(zip(plan.layers, plan.get("fetch").shares, strict=True)) if "fetch" in names else None
    if fetch is not None:
        check_cap(roles.selects, plan.get("fetch").ratio)
    near = dict(zip(plan.layers, plan.get("near").shares, strict=True)) if "near" in names else None
    return Levers(kept, near, fetch)


def check_levers(roles: Roles, levers: Levers, limits: StoreLimits, *, has_disk: bool) -> None:
    """Raise ConfigError where levers and storage contradict each other."""
    if isinstance(roles.selects, Indexer) and limits.evict != "refuse" and not has_disk:
        raise ConfigError(
            f"evict: the model's indexer may choose any record, so none may be lost, got {limits.evict!r}; leave evict "
            "out, or add disk=, where only copies go"
        )
    if not roles.keeps and levers.near is None:
        return
    evictor = type(roles.evicts).__name__
    if has_disk or limits.quant is not None:
        name = "disk" if has_disk else "quant"
        if not isinstance(roles.evicts, XKV):
            raise ConfigError(
                f"{name}: {evictor} reads whole layers in place, as the model made them; leave {name} out, or choose a "
                "method that evicts nothing"
            )
        raise ConfigError(f"{name}: XKV's levers keep and near read whole layers in place; with {name} use lever fetch")
    if roles.keeps and limits.evict != "refuse":
        raise ConfigError(f"evict: {evictor} evicts by its own scores, so {limits.evict!r} has no say; leave evict out")


def check_cap(method: Method | None, ratio: float) -> None:
    """Raise ConfigError where a plan's fetch caps contradict the selector's own."""
    if isinstance(method, InfiniGen) and method.paper:
        raise ConfigError(
            "InfiniGen(paper=True): reads its first layer whole, so a plan cannot cap it; use the default"
        )
    # Where the fraction was left out, the plan's is taken.
    own = None if method is None else method.fraction
    if own is not None and own + 1e-9 < ratio:
        raise ConfigError(
            f"fraction: the plan fetches {ratio:.3f} of the KV per step, the cap is {own}; leave the fraction out, or "
            f"make a plan for it: farkv plan --ratio {own} --lever fetch"
        )


def find_profile(model: PreTrainedModel, profile: Profile | str | Path | bool | None) -> Profile | None:
    """Return the given profile, or the one beside the model's weights."""
    if profile is False or isinstance(profile, Profile):
        return profile or None
    if isinstance(profile, str | Path):
        return Profile.load(profile)
    if profile is not None:
        raise ConfigError(f"profile: expected a Profile, its path, False or None, got {type(profile).__name__}")
    # A model that came from no folder has nothing beside it, least of all in the working one.
    folder = getattr(model.config, "_name_or_path", "")
    beside = find_beside(folder) if folder else None
    return Profile.load(beside) if beside is not None and beside.is_file() else None
