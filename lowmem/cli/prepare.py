"""Large photographs, shrunk once."""

from pathlib import Path
from typing import Annotated

import typer

from lowmem.cli.app import app
from lowmem.cli.options import CacheBytes, CacheFolder


@app.command()
def prepare(
    data: Annotated[
        Path, typer.Argument(metavar="DIR", help="A data folder, as for lowmem train --data.", show_default=False)
    ],
    max_side: Annotated[
        int,
        typer.Option(
            "--max-side", min=16, max=16384, help="Longer side of the shrunk images, in pixels.", show_default=False
        ),
    ],
    cache: CacheFolder = None,
    cache_bytes: CacheBytes = None,
) -> None:
    """Shrink large photographs once, for lowmem train --set data.max_side=N. Ctrl-C keeps what there is; nothing is written into DIR."""
    from lowmem.preparation import PrepareRequest, prepare_folder

    prepare_folder(PrepareRequest(data, max_side, cache, cache_bytes))
