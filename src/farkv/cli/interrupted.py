"""Ctrl-C, and what there is in spite of it."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """Ctrl-C that a command has heard: it printed what it had, and its text says what that is, or how to go on."""
