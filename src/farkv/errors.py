"""The exceptions that farkv raises. `FarKVError` is the base of all of them.

    FarKVError
    ├── ConfigError (ValueError)            an option has an invalid value
    ├── InputError (ValueError)             a file, prompt or model name is unusable
    ├── UnsupportedModelError (ValueError)  the architecture or attention implementation is not supported
    ├── CapacityError (MemoryError)         a request does not fit within a byte limit
    ├── CacheStateError (RuntimeError)      a call is invalid in the cache's current state
    ├── ProfileError (ValueError)           a profile file is damaged or belongs to another model
    ├── PlanError (ValueError)              a plan file is damaged, belongs to another model, or lacks a lever
    ├── StoreError (OSError)                a file or page could not be written, read or verified
    └── SessionError (ValueError)           a session file is damaged, or belongs to another model or text

Each message says what happened, what was expected, what was found, and the remedy, on one line: what others put into
it (names, options, errors of the system) cannot end it, move a cursor or fill a screen.
"""

from __future__ import annotations

from farkv.quote import make_line


class FarKVError(Exception):
    """Base class of all errors that farkv raises deliberately."""

    def __init__(self, *args: object):
        super().__init__(*(make_line(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(FarKVError, ValueError):
    """An option has an invalid value."""


class InputError(FarKVError, ValueError):
    """A file, prompt or model name is unusable."""


class UnsupportedModelError(FarKVError, ValueError):
    """The architecture or attention implementation is not supported."""


class CapacityError(FarKVError, MemoryError):
    """A request does not fit within a byte limit."""


class CacheStateError(FarKVError, RuntimeError):
    """A call is invalid in the cache's current state."""


class ProfileError(FarKVError, ValueError):
    """A profile file is damaged or belongs to another model."""


class PlanError(FarKVError, ValueError):
    """A plan file is damaged, belongs to another model, or lacks the requested lever."""


class StoreError(FarKVError, OSError):
    """A file or page could not be written, read or verified."""


class SessionError(FarKVError, ValueError):
    """A session file is damaged, or belongs to another model, tokenizer or text."""
