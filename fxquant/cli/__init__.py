"""The command line: results on stdout, progress and errors on stderr, telling exit codes."""

from fxquant.cli.run import main

__all__ = ["main"]
