"""Evaluation that touches the cache: tasks, methods, paired results, reports; one command runs it."""

from __future__ import annotations
