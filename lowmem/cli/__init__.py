"""The commands: each parses its options and calls one function of the engine. A module here holds the commands of one job."""

from lowmem.cli import train, prepare, plan, profile, bench, predict, report, doctor  # noqa: F401, I001 - each registers its commands, in the order of the help
from lowmem.cli.app import app, main

__all__ = ["app", "main"]
