"""The door: all that knows transformers. What is installed is looked at first."""

from farkv.requires import check_versions

check_versions()
