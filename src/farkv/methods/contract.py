"""What the door drives: one `Recipe` per cache, and what passes between them.

A recipe holds the steps of one method in the method's order. It joins the rooms (`per_prompt`, `per_token`,
`store`); it does no tensor maths and knows nothing of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from farkv._axes import Bool, Float, Int, Tensor
from farkv.calibrate.profile import Profile
from farkv.config import XKV, Source
from farkv.kernels.gpu import Gpu
from farkv.kernels.native import Native
from farkv.receipt import Account
from farkv.store.records import StoreLimits
from farkv.store.sizes import Allowed, LayerShape
from farkv.store.tiers import Tiers


class Query(NamedTuple):
    """A post-RoPE query and how its logits are formed: softcap(scaling * q . k)."""

    q: Float[Tensor, "B Hq T D"]
    scaling: float
    softcap: float | None


class Step(NamedTuple):
    """One attention call: the new tokens' queries, keys and values, and what the queries may see."""

    query: Query
    k: Float[Tensor, "B Hkv T D"]
    v: Float[Tensor, "B Hkv T Dv"]
    mask: Bool[Tensor, "b 1 T S"] | None


@runtime_checkable
class Kernel(Protocol):
    """The model's own attention, and what it takes to stand in for it."""

    @property
    def sinks(self) -> Float[Tensor, " Hq"] | None:
        """Return the learned logits that take part in the denominator alone, None where the model has none."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> object:
        """Attend to the given records; the output has any form."""
        ...

    def wrap(self, out: Float[Tensor, "B Hq T Dv"]) -> object:
        """Give an output that was computed elsewhere the form that a call gives it."""
        ...


class Own(NamedTuple):
    """What each sequence of a padded batch may read: as many records as it would alone.

    recent: of its window, the tokens before the tail; they are chosen early, before all others. None: none have any.
    """

    sinks: Int[Tensor, "b 1 1"]
    early: Int[Tensor, "b 1 1"]
    late: Int[Tensor, "b 1 1"]
    recent: Int[Tensor, "b 1 1"] | None


class Budget(NamedTuple):
    """How the records of one layer and step are split; their sum is the cap.

    In a padded batch these are the largest of all sequences, but for the tail, which is the smallest; `own` says what
    each may read.
    """

    sinks: int
    early: int
    late: int
    tail: int
    own: Own | None = None

    @property
    def own_sinks(self) -> int | Int[Tensor, "b 1 1"]:
        """Return the sinks of every sequence."""
        return self.sinks if self.own is None else self.own.sinks

    @property
    def own_early(self) -> Int[Tensor, "b 1 1"] | None:
        """Return how many each sequence may read early; None where all read the same."""
        return None if self.own is None else self.own.early

    @property
    def own_late(self) -> Int[Tensor, "b 1 1"] | None:
        """Return the same of those read late."""
        return None if self.own is None else self.own.late


class Levers(NamedTuple):
    """What limits each layer besides the method's own choice; None where nothing does.

    xkv: how records are scored.  keep: evict.  allowed: how many each layer keeps; None: found from each prompt.
    near, fetch: the share of the context that each layer holds near, and may read per step.
    """

    xkv: XKV | None = None
    keep: bool = False
    allowed: dict[int, Allowed] | None = None
    near: dict[int, float] | None = None
    fetch: dict[int, float] | None = None


class Fast(NamedTuple):
    """The fast kernels of this machine, and where they stand in for the plain operations.

    kernels: None where there are none, or none are wanted.  everywhere: also where every record is read, which is then
    equal to the model's own attention to rounding, not bit for bit.  dense_tokens: up to here reading everything is
    faster than choosing, where no cap was asked for.
    """

    kernels: Native | Gpu | None = None
    everywhere: bool = False
    dense_tokens: int = 0


class Setting(NamedTuple):
    """What a user set around a method: byte limits, what was measured of the model, what a plan limits, kernels."""

    limits: StoreLimits = StoreLimits()
    profile: Profile | None = None
    levers: Levers = Levers()
    fast: Fast = Fast()


class Place(NamedTuple):
    """Where a recipe works: the managed layers, the limits, the device, the books, the levers and the kernels."""

    layers: list[int]
    limits: StoreLimits
    device: torch.device
    account: Account
    levers: Levers = Levers()
    fast: Fast = Fast()


@runtime_checkable
class Recipe(Protocol):
    """One method at work on one cache."""

    store: Tiers
    account: Account
    # Which hidden state the door estimates queries from; None where nothing is speculated.
    query_source: Source | None
    # Of one layer's records, once there are any; all sequences.
    shape: LayerShape | None
    # True while a verifying pass runs: attend to everything, count nothing.
    dense: bool
    # True where steps will be verified: their dense passes need near memory beside the buffers.
    verifying: bool
    # True while steps are verified: measure the attention mass that the choice holds.
    measuring: bool
    # Tokens of a prompt that is read in several passes; 0: any pass of more than one token may be its end.
    prompt_tokens: int
    # True where reading the prompt in one pass lets every layer be evicted as it is read.
    wants_one_pass: bool

    def admit(self, shape: LayerShape, n_new: int, chunk: int = 0) -> None:
        """Raise CapacityError unless every limit can hold `n_new` more tokens, `chunk` at once; nothing is stored."""
        ...

    def fit_chunk(self, n_tokens: int) -> int:
        """Return how many tokens of a prompt to read at once, at most `n_tokens`."""
        ...

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store new tokens. Raises CapacityError, at the first layer, before anything is stored."""
        ...

    def wants_estimate(self, layer: int) -> bool:
        """Say whether `speculate` would be of use for this layer now."""
        ...

    def speculate(self, layer: int, estimate: Query) -> None:
        """Choose records for a layer that has not run yet and start their fetch."""
        ...

    def attend(self, layer: int, step: Step, kernel: Kernel) -> object:
        """Run attention of one layer over all records (T > 1) or the chosen ones (T = 1)."""
        ...

    @property
    def is_padded(self) -> bool:
        """Say whether some tokens are padding."""
        ...

    def take_text(self, shape: LayerShape, dtype: torch.dtype, fill: Callable[[], None]) -> None:
        """Hold the records of a text that was read before, which `fill` puts into the store."""
        ...

    def crop(self, n_tokens: int, layer: int) -> None:
        """Forget the newest tokens of a layer."""
        ...

    def select(self, sequences: Int[Tensor, " N"], layer: int) -> None:
        """Keep these sequences of the batch, in this order."""
        ...

    def clear(self, layer: int) -> None:
        """Forget everything of a layer."""
        ...
