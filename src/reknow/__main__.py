"""`python -m reknow`, for launchers that start a module."""

from reknow.cli import main

main()
