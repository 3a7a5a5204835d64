"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file.")]
Data = Annotated[
    Optional[Path],
    typer.Option(
        "--data", help="Folder with train/ and val/, or one folder of class folders. Without it: the embedded images."
    ),
]
Vram = Annotated[str, typer.Option("--vram", help="Memory that training may use on the device, e.g. 8G.")]
Ram = Annotated[Optional[str], typer.Option("--ram", help="Host memory that the run may take in all, e.g. 16G.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Set = Annotated[
    Optional[list[str]],
    typer.Option("--set", help="Override a field of the recipe: --set optimizer.lr=1e-4. Repeatable."),
]
Weights = Annotated[Optional[Path], typer.Option("--weights", help="Initial weights: a safetensors or .pth file.")]
Allow = Annotated[
    str, typer.Option("--allow", help="How far a plan may go: bitwise, rounding or statistical (another classifier).")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
CheckpointEvery = Annotated[
    str, typer.Option("--checkpoint-every", help="Besides each epoch's end: 10m, 600s or 500-steps.")
]

CacheFolder = Annotated[
    Optional[Path],
    typer.Option(
        "--cache", help="Where images shrunk once (data.max_side) are kept. Default: the user's cache folder.", file_okay=False
    ),
]
CacheBytes = Annotated[
    Optional[str], typer.Option("--cache-bytes", help="What that folder may hold; the longest unused go first. Default: 20G.")
]


def overrides(set_: list[str] | None, weights: Path | None) -> tuple[str, ...]:
    extra = () if weights is None else (f'model.weights="file:{weights.as_posix()}"',)
    return (*(set_ or ()), *extra)
