"""The control: a plain training script of the usual make, for the same model, images and faults as the tiny run.

It saves a state_dict, the optimizer and the best metric with torch.save in place after every step, seeds torch once, lets a
DataLoader shuffle, compares metrics with `>`, and goes on after a crash at the start of the epoch that was running. Every part of
that is common, and each loses something: it is here to show that the faults are real.

    python tests/faults/control_script.py IMAGES OUT [EPOCHS]
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

LAST, BEST = "last.pth.tar", "model_best.pth.tar"


def main(images: str, out: str, epochs: int = 4, stop_after: int | None = None, poison: Any = None) -> dict[str, Any]:
    """Train or continue; `stop_after` steps ends it as a kill would; `poison(epoch, loss)` may change a validation loss."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, val = _datasets(Path(images))
    model = timm.create_model("test_resnet", num_classes=3, drop_rate=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start_epoch, best_metric = 0, None
    if (folder / LAST).exists():
        checkpoint = torch.load(folder / LAST, weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start_epoch, best_metric = checkpoint["epoch"], checkpoint["best_metric"]
    loader = DataLoader(train, batch_size=8, shuffle=True, drop_last=True)
    num_steps = 0
    for epoch in range(start_epoch, epochs):
        model.train()
        for x_BCHW, labels_B in loader:
            F.cross_entropy(model(x_BCHW), labels_B).backward()
            optimizer.step()
            optimizer.zero_grad()
            _save(folder / LAST, model, optimizer, epoch, best_metric)
            num_steps += 1
            if num_steps == stop_after:
                return {}
        model.eval()
        with torch.no_grad():
            metric = -float(F.cross_entropy(model(val.tensors[0]), val.tensors[1]))
        metric = poison(epoch, metric) if poison else metric
        if best_metric is None or metric > best_metric:
            best_metric = metric
            _save(folder / BEST, model, optimizer, epoch, best_metric)
        _save(folder / LAST, model, optimizer, epoch + 1, best_metric)
    return {"best_metric": best_metric, **{name: t.clone() for name, t in model.state_dict().items()}}


def _save(path: Path, model: Any, optimizer: Any, epoch: int, best_metric: Any) -> None:
    state = {
        "epoch": epoch,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best_metric": best_metric,
    }
    torch.save(state, path)


def _datasets(root: Path) -> tuple[TensorDataset, TensorDataset]:
    files = [(label, path) for label, name in enumerate(("1", "2", "10")) for path in sorted((root / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path).resize((32, 32))) for _, path in files])
    x_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    labels_B = torch.tensor([label for label, _ in files])
    held_out = torch.arange(len(files)) % 5 == 0
    return TensorDataset(x_BCHW[~held_out], labels_B[~held_out]), TensorDataset(x_BCHW[held_out], labels_B[held_out])


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
