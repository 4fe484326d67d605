"""`python -m phi4r` is the `phi4r` command."""

from phi4r.cli.main import main

main()
