"""What `--model_args` may say. In: the harness's keyword arguments. Out: checked values, and a model with a method.

The harness has turned numbers, `true`, `false` and `none` into what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from farkv.config import check_fraction
from farkv.errors import ConfigError
from farkv.evals.methods import FULL, attach_options, find_method, make_method
from farkv.hf.attach import attach, find_profile
from farkv.hf.handle import Handle
from farkv.hf.load import load_model
from farkv.methods import XKV, InfiniGen, Method

FRACTION = 0.1
# What `lm_eval` says where the user does not; farkv's own `auto` is the same where there is a GPU.
HARNESS_DEVICE = "cuda:0"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The model's arguments.

    Args:
        pretrained: demo, a folder, or a hub id.
        method: a name of `farkv eval --methods`.
        fraction: hard cap on the KV bytes read per step; 0.1 where it is left out, and 1 for `full`.
        near, host, disk, evict, quant, kernel: as for `farkv.attach`.
        profile: a file; left out, the one beside the model; false: none.
        plan: a file, with method infinigen or xkv; it says what `fraction` would say.
        dtype, device: as on the command line.
        max_length: longest context and answer together; left out, the model's.
        max_gen_toks: longest answer where the task does not say.
        add_bos_token: whether texts begin with the tokenizer's special tokens; left out, as the tokenizer does it.
        rolling_prefill: share of a perplexity window that is read at once, and scored without the cache.
        batch_size: 1 or auto, which is 1.
        max_batch_size: what the harness says beside auto.
    """

    pretrained: str
    method: str = "infinigen"
    fraction: float | None = None
    near: int | str | None = None
    host: int | str | None = None
    disk: str | None = None
    evict: str = "refuse"
    quant: str | None = None
    kernel: str = "auto"
    profile: str | bool | None = None
    plan: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    rolling_prefill: float = 0.0
    batch_size: int | str = 1
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if str(self.batch_size) not in ("1", "auto"):
            raise ConfigError(
                f"batch_size: each text has a cache of its own, expected 1 or auto, got {self.batch_size!r}"
            )
        if self.fraction is not None:
            check_fraction(self.fraction)
        if not 0 <= self.rolling_prefill < 1:
            raise ConfigError(f"rolling_prefill: expected a share in [0, 1), got {self.rolling_prefill!r}")
        for name in ("max_length", "max_gen_toks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: expected a number of tokens, got {value!r}")
        known = find_method(self.method)
        if self.plan is not None and (self.method not in PLANNED or self.fraction is not None):
            raise ConfigError(f"plan: expected it with method {' or '.join(PLANNED)} and without fraction")
        if known.far and self.near is None:
            raise ConfigError(f"method {self.method}: near memory is a tier of its own; give its limit: near=2GiB")

    @property
    def need_fraction(self) -> float:
        """The cap, after the default is filled in."""
        default = 1.0 if self.method == FULL else FRACTION
        return default if self.fraction is None else self.fraction

    @property
    def is_sparse(self) -> bool:
        """Say whether decode steps must read less than a full cache."""
        return self.plan is not None or (self.method != FULL and self.need_fraction < 1)

    @property
    def copies(self) -> bool:
        """Say whether a read text may stand in memory twice: not where its bytes are limited."""
        return self.near is None and self.host is None and self.disk is None

    def make_config(self) -> Method:
        """Return the method's config."""
        return make_method(self.method, self.need_fraction) if self.plan is None else PLANNED[self.method]


PLANNED: dict[str, Method] = {"infinigen": InfiniGen(), "xkv": XKV()}
KNOWN = tuple(field.name for field in fields(Arguments))


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check what the harness was told.

    Raises:
        ConfigError: an argument is unknown or cannot be used, or there is no model.
    """
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise ConfigError(f"model_args: unknown {', '.join(unknown)}; expected some of {', '.join(KNOWN)}")
    if not given.get("pretrained"):
        raise ConfigError("model_args: expected pretrained=MODEL, got none; give demo, a folder or a hub id")
    # `none` leaves an argument as it is by default, and the harness's own default device is for machines with a GPU.
    settled = {n: v for n, v in given.items() if v is not None and (n, v) != ("device", HARNESS_DEVICE)}
    return Arguments(**settled)


def open_model(arguments: Arguments) -> tuple[Handle, Any]:
    """Load the model and attach the method; return the handle and the tokenizer."""
    model, tokenizer = load_model(arguments.pretrained, dtype=arguments.dtype, device=arguments.device)
    config, known = arguments.make_config(), find_method(arguments.method)
    options: dict[str, Any] = {"plan": arguments.plan}
    if known.plan is not None:
        options = attach_options(known, find_profile(model, arguments.profile), arguments.need_fraction, 0)
    options |= {n: getattr(arguments, n) for n in ("near", "host", "disk", "evict", "quant", "kernel", "profile")}
    return attach(model, config, **options), tokenizer
