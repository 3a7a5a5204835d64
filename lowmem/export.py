"""`lowmem export`: a classifier for other runtimes, checked against PyTorch before it is kept.

The ONNX graph takes `images`, float32 [B, 3, px, px], normalised, for any B, and gives `logits`, float32 [B, K]. Its metadata hold all that
a caller needs: `classes` (JSON, in the order of the logits), `mean` and `std` (JSON, of pixels in 0 to 1), `px`, `crop_frac` (the central part
that is kept of an image whose short side was resized to px / crop_frac), `interpolation`, and `max_side` (before all that, an image with a
longer side above it was shrunk to it, Lanczos; 0: not at all).
"""

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from lowmem.errors import LowmemError
from lowmem.results.classifier import ClassifierInfo, load_classifier

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3
"""Largest difference of a logit from PyTorch's, as a share of the largest logit; float32 sums in another order differ by about 1e-6."""
CHECKED_BATCHES = (1, 3, 2)
"""Sizes other than the traced one show that the batch is free."""


def export_onnx(run: Path, out: Path | None, px: int | None, console: Console) -> Path:
    """Write the classifier as ONNX and compare it with PyTorch in onnxruntime; raises LowmemError, and keeps nothing, where they differ."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise LowmemError(f"Exporting needs {', '.join(missing)}. Type pip install 'lowmem[export]'.")
    model, info = load_classifier(run)
    px, path = px or info.test_px, out or run / "classifier.onnx"
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write(model, info, px, partial)
        difference = _largest_difference(model, partial, px)
        if not difference <= TOLERANCE:
            raise LowmemError(
                f"{path}: onnxruntime's logits differ from PyTorch's by {difference:.2g} of the largest, more than {TOLERANCE:g}. "
                f"Nothing was kept."
            )
        partial.replace(path)
    except OSError as error:
        raise LowmemError(f"--out {path}: cannot be written: {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)
    console.print(
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {len(info.classes)} classes, {px} px, any batch; onnxruntime's logits are "
        f"PyTorch's within {difference:.1g} (allowed: {TOLERANCE:g} of the largest).",
        highlight=False,
        soft_wrap=True,
    )
    return path


def _write(model: nn.Module, info: ClassifierInfo, px: int, path: Path) -> None:
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (_images(2, px),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except OSError:
        raise
    except Exception as error:  # whatever the exporter meets in a network or at a size that it does not take
        raise LowmemError(f"{info.architecture} at {px} px cannot be exported: {str(error).splitlines()[0]}") from error
    assert program is not None
    proto = program.model_proto
    facts = {
        "classes": json.dumps(info.classes, ensure_ascii=False),
        "mean": json.dumps(info.mean),
        "std": json.dumps(info.std),
        "px": str(px),
        "crop_frac": str(info.crop_frac),
        "interpolation": "bilinear",
        "max_side": str(info.max_side),
        "architecture": info.architecture,
    }
    onnx.helper.set_model_props(proto, facts)
    path.write_bytes(proto.SerializeToString())


def _largest_difference(model: nn.Module, path: Path, px: int) -> float:
    """Of the logits on seeded noise, relative to the largest; infinite where a shape differs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch_size in CHECKED_BATCHES:
        images_BCHW = _images(batch_size, px)
        with torch.inference_mode():
            expected_BK = model(images_BCHW)
        found_BK = torch.from_numpy(session.run(None, {"images": images_BCHW.numpy()})[0])
        if found_BK.shape != expected_BK.shape:
            return float("inf")
        scale = max(float(expected_BK.abs().max()), 1e-12)
        largest = max(largest, float((found_BK - expected_BK).abs().max()) / scale)
    return largest


def _images(batch_size: int, px: int) -> Tensor:
    return torch.randn(batch_size, 3, px, px, generator=torch.Generator().manual_seed(batch_size))
