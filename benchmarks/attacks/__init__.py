"""Attacks on farkv, one file per kind; `reliability.py` runs them all. Each row of a file's `ATTACKS` is one attack.

An attack does `tries` seeded things that should not go well, and says of each what came of it. It uses nothing newer
than the release before it, so that the same file can be run on older code.
"""
