"""Classifiers at work: labels for images, scores for labelled ones."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.cli.app import app
from lowmem.cli.options import Device, RunArgument, Vram

Flip = Annotated[bool, typer.Option("--flip", help="Average the probabilities with those of the mirrored image.")]


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
    out: Annotated[Path, typer.Option("--out", help="CSV file to write: image_name, pred_label, probability.")] = Path(
        "predictions.csv"
    ),
    top: Annotated[int, typer.Option("--top", min=1, help="Labels per image.")] = 1,
    vram: Vram = "8G",
    device: Device = "auto",
    flip: Flip = False,
    zip_: Annotated[bool, typer.Option("--zip", help="Also write the CSV zipped, beside it.")] = False,
    px: Annotated[
        Optional[int], typer.Option("--px", min=16, help="Image size. Default: the classifier's test size.")
    ] = None,
) -> None:
    """Label images; several runs average their probabilities."""
    from lowmem.inference import PredictRequest, predict_to_csv

    predict_to_csv(PredictRequest(runs, out, top, vram, device, flip, px, zip_), Console())


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of class folders.", show_default=False)],
    vram: Vram = "8G",
    device: Device = "auto",
    px: Annotated[
        Optional[str],
        typer.Option("--px", help="Image size, or several: 224,288,320. Default: the classifier's test size."),
    ] = None,
    flip: Flip = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="Make the best of several sizes the classifier's test size.")
    ] = False,
) -> None:
    """Accuracy, macro precision, recall, F1, loss and the commonest confusions on labelled images."""
    from lowmem.assessment import EvaluateRequest, evaluate_folder

    evaluate_folder(EvaluateRequest(run, data, vram, device, px, flip, choose), Console())


@app.command()
def export(
    run: RunArgument,
    onnx: Annotated[bool, typer.Option("--onnx", help="As an ONNX graph (the only format so far).")] = False,
    px: Annotated[
        Optional[int], typer.Option("--px", min=16, help="Image size. Default: the classifier's test size.")
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="File to write. Default: RUN/classifier.onnx.")] = None,
) -> None:
    """Write a classifier for other runtimes, checked against PyTorch."""
    from lowmem.errors import LowmemError
    from lowmem.export import export_onnx

    if not onnx:
        raise LowmemError("lowmem export: say in which format, as in lowmem export RUN --onnx.")
    export_onnx(run, out, px, Console())
