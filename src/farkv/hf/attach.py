"""Attach a method to an unmodified model. In: what the user chose. Out: a checked `Handle`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from farkv.config import InfiniGen, Method, parse_bytes
from farkv.errors import CacheStateError, ConfigError
from farkv.hf.attention import NAME
from farkv.hf.handle import Handle
from farkv.hf.identity import identify_model
from farkv.per_model.profile import Profile
from farkv.store.tiers import StoreLimits

PROFILE_NAME = "profile.safetensors"


def attach(
    model: PreTrainedModel,
    *methods: Method,
    near: int | str | None = None,
    host: int | str | None = None,
    profile: Profile | str | Path | bool | None = None,
) -> Handle:
    """Let a model decode from a far KV store.

    Args:
        model: any decoder-only model on one device that routes attention through the attention interface.
        methods: one method's config; InfiniGen() if none is given.
        near: limit of near memory, in bytes or as text ("2GiB"): a GPU's memory, or on a CPU a counted
            allocation of its own. None on a CPU: the pool itself is near memory.
        host: limit of the host pool.
        profile: a profile or its path. None: the one beside the model's weights, if there is one; False: none,
            the skew is then estimated from each prompt.

    Raises:
        UnsupportedModelError: this architecture or attention implementation cannot be managed.
        ConfigError: an option's value cannot be used.
        ProfileError: the profile is damaged or of another model.
    """
    if len(methods) > 1:
        raise ConfigError(f"attach: expected one method, got {len(methods)}")
    limits = StoreLimits(parse_bytes(near, "near"), parse_bytes(host, "host"))
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME:
        raise CacheStateError("attach: the model is attached already; detach it first")
    method = methods[0] if methods else InfiniGen()
    loaded = find_profile(model, profile)
    if loaded is not None:
        loaded.check(identify_model(model))
    return Handle(model, method, limits, loaded)


def find_profile(model: PreTrainedModel, profile: Profile | str | Path | bool | None) -> Profile | None:
    """Return the given profile, or the one beside the model's weights."""
    if isinstance(profile, Profile) or profile is False:
        return profile or None
    if isinstance(profile, str | Path):
        return Profile.load(profile)
    beside = Path(getattr(model.config, "_name_or_path", "") or "") / PROFILE_NAME
    return Profile.load(beside) if beside.is_file() else None
