"""`python -m flexlora` is `flexlora`."""

from flexlora.cli import main

main()
