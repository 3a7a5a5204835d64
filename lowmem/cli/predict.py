"""Classifiers at work: labels for images, scores for labelled ones."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.cli.app import app
from lowmem.cli.options import Device, RunArgument, Vram


@app.command()
def predict(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... IMAGES",
            help="Run or classifier folders, then a folder of images or an image.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")] = Path("predictions.csv"),
    top: Annotated[int, typer.Option("--top", min=1, help="Labels per image.")] = 1,
    vram: Vram = "8G",
    device: Device = "auto",
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    px: Annotated[
        Optional[int], typer.Option("--px", min=16, help="Image size. Default: the classifier's test size.")
    ] = None,
) -> None:
    """Label images; several runs average their probabilities."""
    from lowmem.inference import predict_to_csv

    predict_to_csv(runs, out, top=top, vram=vram, device=device, flip=flip, px=px, console=Console())


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of class folders.", show_default=False)],
    vram: Vram = "8G",
    device: Device = "auto",
    px: Annotated[Optional[int], typer.Option("--px", help="Image size. Default: the classifier's test size.")] = None,
) -> None:
    """Accuracy, macro precision, recall, F1, loss and the confusion matrix on labelled images."""
    from lowmem.inference import evaluate_folder

    evaluate_folder(run, data, vram=vram, device=device, px=px, console=Console())
