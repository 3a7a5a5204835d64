"""The sweet spot of a machine."""

import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.cli.app import app
from lowmem.cli.options import Data, Device, Ram, RecipeName, Set, Vram


@app.command()
def profile(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    vram: Vram = "8G",
    ram: Ram = None,
    device: Device = "auto",
    minutes: Annotated[float, typer.Option("--minutes", help="How long it may measure.")] = 5.0,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Folder to write. Default: profiles/RECIPE-DATE-TIME.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Where the memory of one training step goes, instead of the sweet spot.")
    ] = False,
    set_: Set = None,
) -> None:
    """Measure plans and loading on this machine with these images, and choose; lowmem train --profile FOLDER follows it."""
    if memory:
        from lowmem.profiling.memory import MemoryRequest, run_memory_profile

        out = out or Path("profiles") / f"{Path(recipe).stem}-memory"
        raise typer.Exit(run_memory_profile(MemoryRequest(recipe, vram, device, out, data, tuple(set_ or ())), Console()))
    started = time.monotonic()  # the imports take seconds
    from lowmem.profiling.command import ProfileRequest, run_profile

    request = ProfileRequest(recipe, data, vram, ram, device, minutes, out, tuple(set_ or ()), started)
    raise typer.Exit(run_profile(request, Console()))
