"""`python -m gsx` is `gsx`."""

from gsx.cli import main

main()
