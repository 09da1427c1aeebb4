"""`python -m workshop COMMAND`."""

from workshop.commands import main

main()
