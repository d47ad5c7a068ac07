"""What farkv raises. Catch `FarKVError` to catch all of it.

    FarKVError
    ├── ConfigError (ValueError)            an option's value cannot be used
    ├── InputError (ValueError)             a file, prompt or model name cannot be used
    ├── UnsupportedModelError (ValueError)  this architecture or attention cannot be managed
    ├── CapacityError (MemoryError)         a byte limit cannot hold what is asked
    ├── CacheStateError (RuntimeError)      a call does not fit the cache's state
    ├── ProfileError (ValueError)           a profile file is damaged or of another model
    ├── PlanError (ValueError)              a plan file is damaged, of another model, or does not drive what is asked
    ├── StoreError (OSError)                the disk store cannot be written, read or trusted
    └── SessionError (ValueError)           a session file is damaged, of another model, or of another text

Each text says what happened, what was expected, what was got, and the remedy.
"""

from __future__ import annotations


class FarKVError(Exception):
    """Base of every error that farkv raises on purpose."""


class ConfigError(FarKVError, ValueError):
    """An option's value cannot be used."""


class InputError(FarKVError, ValueError):
    """A file, prompt or model name cannot be used."""


class UnsupportedModelError(FarKVError, ValueError):
    """This architecture or attention implementation cannot be managed."""


class CapacityError(FarKVError, MemoryError):
    """A byte limit cannot hold what is asked of it."""


class CacheStateError(FarKVError, RuntimeError):
    """A call does not fit the cache's state."""


class ProfileError(FarKVError, ValueError):
    """A profile file is damaged or belongs to another model."""


class PlanError(FarKVError, ValueError):
    """A plan file is damaged, belongs to another model, or does not drive what is asked of it."""


class StoreError(FarKVError, OSError):
    """The disk store cannot be written, read or trusted."""


class SessionError(FarKVError, ValueError):
    """A session file is damaged, belongs to another model or tokenizer, or holds another text."""
