"""The application that the commands register with, and its way out: users meet LowmemError in a few lines."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lowmem.errors import LowmemError
from lowmem.training.interrupt import EXIT_STOPPED, stopping_at_once

EXIT_ERROR, EXIT_DIFFERS = 2, 3

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train image classifiers in the memory you have, and get the classifier that a big card would give.",
)
DEBUG = {"on": False}


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    DEBUG["on"] = debug


def main() -> None:
    """Entry point: users meet LowmemError in a few lines; `--debug` shows the traceback."""
    # OpenMP threads that sleep instead of spinning leave the cores to the loader. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    try:
        with stopping_at_once():
            app()
    except LowmemError as error:
        if DEBUG["on"]:
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        sys.exit(EXIT_STOPPED)
