"""The options in `--model_args`. In: the harness's keyword arguments. Out: checked values, and a model with a method.

The harness has already converted numbers, `true`, `false` and `none` to Python values.
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
# The harness's default device; with a GPU, farkv's `auto` means the same.
HARNESS_DEVICE = "cuda:0"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The model's arguments.

    Args:
        pretrained: demo, a folder, a GGUF file, or a hub id.
        method: a name as in `farkv eval --methods`.
        fraction: hard cap on the KV bytes read per step; default 0.1, and 1 for `full`.
        near, host, disk, evict, quant, kernel: as in `farkv.attach`.
        profile: a file; default: the one beside the model; false: none.
        plan: a file, for method infinigen or xkv; replaces `fraction`.
        dtype, device: as on the command line.
        max_length: maximum tokens of context and answer together; default: the model's.
        max_gen_toks: maximum answer length if the task sets none.
        add_bos_token: whether texts begin with special tokens; default: the tokenizer's behaviour.
        rolling_prefill: fraction of a perplexity window that is prefilled, and so scored without the cache.
        batch_size: 1 or auto, which is 1.
        max_batch_size: ignored; the harness passes it with auto.
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
                f"batch_size: expected 1 or auto, because each text has its own cache, got {self.batch_size!r}"
            )
        if self.fraction is not None:
            check_fraction(self.fraction)
        if not 0 <= self.rolling_prefill < 1:
            raise ConfigError(f"rolling_prefill: expected a fraction in [0, 1), got {self.rolling_prefill!r}")
        for name in ("max_length", "max_gen_toks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: expected a number of tokens, got {value!r}")
        known = find_method(self.method)
        if self.plan is not None and (self.method not in PLANNED or self.fraction is not None):
            raise ConfigError(f"plan: expected it with method {' or '.join(PLANNED)} and without fraction")
        if known.far and self.near is None:
            raise ConfigError(f"method {self.method}: needs a near memory limit, got none; add near=2GiB")

    @property
    def need_fraction(self) -> float:
        """The cap, with the default applied."""
        default = 1.0 if self.method == FULL else FRACTION
        return default if self.fraction is None else self.fraction

    @property
    def is_sparse(self) -> bool:
        """Whether decode steps must read less than a full cache."""
        return self.plan is not None or (self.method != FULL and self.need_fraction < 1)

    @property
    def copies(self) -> bool:
        """Whether a prefilled text may be in memory twice: not if its bytes are limited."""
        return self.near is None and self.host is None and self.disk is None

    def make_config(self) -> Method:
        """Return the method's config."""
        return make_method(self.method, self.need_fraction) if self.plan is None else PLANNED[self.method]


PLANNED: dict[str, Method] = {"infinigen": InfiniGen(), "xkv": XKV()}
KNOWN = tuple(field.name for field in fields(Arguments))


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check the harness's arguments.

    Raises:
        ConfigError: an argument is unknown or invalid, or there is no model.
    """
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise ConfigError(f"model_args: unknown {', '.join(unknown)}; expected some of {', '.join(KNOWN)}")
    if not given.get("pretrained"):
        raise ConfigError(
            "model_args: expected pretrained=MODEL, got none; give demo, a folder, a GGUF file or a hub id"
        )
    # `none` means the default; the harness's default device is dropped because it requires a GPU.
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
