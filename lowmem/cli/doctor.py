"""The doctor: what is in the way of training on this computer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lowmem.cli.app import app


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Findings and facts as JSON.")] = False,
    out: Annotated[
        Path, typer.Option("--out", help="Where runs would go: its disk is looked at.", exists=True, file_okay=False)
    ] = Path("."),
) -> None:
    """Look at the GPU, torch, memory, cores, disk and image library, and say what to type. Exit code 1: a problem."""
    from lowmem.doctor.command import run_doctor

    raise typer.Exit(run_doctor(out, json, Console()))
