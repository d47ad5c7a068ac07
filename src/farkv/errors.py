"""The exceptions that farkv raises. `FarKVError` is the base of all of them.

    FarKVError
    ├── ConfigError (ValueError)            an option has an invalid value
    ├── InputError (ValueError)             a file, prompt or model name is unusable
    ├── UnsupportedModelError (ValueError)  the architecture or attention implementation is not supported
    ├── CapacityError (MemoryError)         a request does not fit within a byte limit
    ├── CacheStateError (RuntimeError)      a call is invalid in the cache's current state
    ├── ProfileError (ValueError)           a profile file is damaged or belongs to another model
    ├── PlanError (ValueError)              a plan file is damaged, belongs to another model, or lacks a lever
    ├── StoreError (OSError)                the disk store failed to write, read or verify a page
    └── SessionError (ValueError)           a session file is damaged, or belongs to another model or text

Each message says what happened, what was expected, what was found, and the remedy.
"""

from __future__ import annotations


class FarKVError(Exception):
    """Base class of all errors that farkv raises deliberately."""


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
    """The disk store failed to write, read or verify a page."""


class SessionError(FarKVError, ValueError):
    """A session file is damaged, or belongs to another model, tokenizer or text."""
