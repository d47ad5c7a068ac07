"""The settings around a method, and the place of one cache's engine. Knows no model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from farkv.account import Account
from farkv.calibrate.profile import Profile
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import Native
from farkv.methods.records import IndexerForm
from farkv.store.records import StoreLimits
from farkv.store.sizes import Allowed
from farkv.store.worker import Worker


class Levers(NamedTuple):
    """What a plan limits per layer, beyond the method's own choice; None where it limits nothing.

    kept: how many records each layer keeps.  near, fetch: the share of the context that each layer pins near, and may
    read per step.
    """

    kept: dict[int, Allowed] | None = None
    near: dict[int, float] | None = None
    fetch: dict[int, float] | None = None


class Kernels(NamedTuple):
    """The fast kernels of this machine, and where they replace the plain operations.

    fast: None where there are none, or none are wanted.  everywhere: also where every record is read, which is then
    equal to the model's own attention to rounding, not bit for bit.  dense_tokens: up to here reading everything is
    faster than choosing, where no cap was asked for.  dense_how: "measured" or "assumed".
    """

    fast: Native | Gpu | None = None
    everywhere: bool = False
    dense_tokens: int = 0
    dense_how: str = ""


class Latents(NamedTuple):
    """What one layer's latents are: their values are the first `rank` numbers of a record, and are stored with it.

    expansion: how many times a record's bytes the keys and values take that the model makes of it to read it.
    """

    rank: int = 0
    expansion: int = 0


class Setting(NamedTuple):
    """What a user set around a method: byte limits, what was measured of the model, what a plan limits, kernels."""

    limits: StoreLimits = StoreLimits()
    profile: Profile | None = None
    levers: Levers = Levers()
    kernels: Kernels = Kernels()
    # Query heads per KV head: the model's own attention may repeat what it reads so often.
    n_groups: int = 1
    # Layers that store latents; None: no layer does.
    latents: dict[int, Latents] | None = None
    # Of the attached model; None: every cache starts its own.
    worker: Worker | None = None
    # The indexer that the model was trained with; None: it has none.
    indexer: IndexerForm | None = None


class Setup(NamedTuple):
    """Where one engine works: the managed layers, their device, what counts, and what the user set.

    verifies: steps will be compared with dense passes, which need near memory beside the buffers.
    """

    layers: list[int]
    device: torch.device
    account: Account
    setting: Setting = Setting()
    verifies: bool = False
