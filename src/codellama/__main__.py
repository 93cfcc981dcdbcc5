"""`python -m codellama` is the command `codellama`."""

from codellama.cli import main

main()
