"""Reports: the page of any result, made again."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.app import app


@app.command()
def report(
    result: Annotated[
        Path,
        typer.Argument(
            metavar="RESULT", help="A run or profile folder, or a file of lowmem bench.", show_default=False
        ),
    ],
) -> None:
    """Write a result's HTML page again: one file, readable anywhere, without a network."""
    from lowmem.reporting import report_of

    print(f"Report: {report_of(result)}")
