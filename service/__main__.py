"""`python -m service` is `ottava`."""

from service.cli import main

main()
