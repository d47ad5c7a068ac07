"""`python -m farkv.cli`."""

from farkv.cli import main

main()
