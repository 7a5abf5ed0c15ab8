"""`python -m schatten` is the `schatten` command."""

from schatten.cli import main

main()
