"""Checkpoints: complete, checksummed, and never seen half-written.

A checkpoint is a folder: model.safetensors, optimizer.safetensors, state.json, and manifest.json with the size and BLAKE2b
checksum of each of them, written last. The folder is written under a temporary name inside the run folder, every file and the
folder are flushed to the disk, and only then is it renamed; a crash leaves the old checkpoint or the new one. No pickle is
written or read. safetensors itself finds truncated files but no flipped bit in the data, hence the checksums.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from lowmem.errors import LowmemError
from lowmem.sizes import format_size
from lowmem.training.schedule import ScheduleState

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
NUM_KEPT = 2
Tensors = dict[str, torch.Tensor]


class RunState(BaseModel):
    """All that must survive a crash, beside the tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    """Epoch in progress, from 1; past the last one when the run is over."""
    step: int
    """Steps of that epoch that are done."""
    losses: tuple[float, ...] = ()
    """The losses of those steps, as far as they were read; all of them in a checkpoint."""
    schedule: ScheduleState
    scaler: dict[str, float | int] | None
    """State of the GradScaler, where there is one."""
    seed: int
    dataset: str
    """Fingerprint of the data set."""
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: tensors on the CPU and the run's state."""

    state: RunState
    model: Tensors
    optimizer: Tensors


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` under `folder` (RUN/checkpoints), verify it, and remove all but the newest two."""
    name = f"{checkpoint.state.epoch:05d}-{checkpoint.state.step:07d}"
    final = folder / name
    partial = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_files(partial, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(t.nbytes for tensors in (checkpoint.model, checkpoint.optimizer) for t in tensors.values())
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise LowmemError(
            f"The checkpoint could not be written to {final}: {error.strerror or error}. It needs {format_size(needed)}; "
            f"{format_size(free)} are free. The previous checkpoint is untouched; free some space and resume."
        ) from error
    _remove_old(folder)
    return final


def newest_checkpoint(folder: Path) -> tuple[Path, Checkpoint, list[str]]:
    """The newest checkpoint under `folder` that verifies, and what was wrong with newer ones; raises LowmemError if none."""
    problems: list[str] = []
    for path in reversed(_checkpoint_folders(folder)):
        try:
            return path, read_checkpoint(path), problems
        except LowmemError as error:
            problems.append(str(error))
    told = "".join(f"\n  {problem}" for problem in problems)
    raise LowmemError(f"{folder} holds no checkpoint that can be resumed.{told}")


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, every byte of it checked; raises LowmemError naming the damaged file or field."""
    verify_checkpoint(path)
    try:
        state = RunState.model_validate_json((path / STATE).read_bytes())
        return Checkpoint(
            state, safetensors.torch.load_file(path / MODEL), safetensors.torch.load_file(path / OPTIMIZER)
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise LowmemError(f"{path / STATE}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LowmemError(f"{path}: {error}.") from error


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest; raises LowmemError naming the first that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        entries = {str(name): (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LowmemError(f"{path / MANIFEST}: missing or damaged ({type(error).__name__}).") from None
    if set(entries) != {MODEL, OPTIMIZER, STATE}:
        raise LowmemError(f"{path / MANIFEST}: names other files than a checkpoint has.")
    for name, (num_bytes, checksum) in entries.items():
        try:
            found = (path / name).stat().st_size
            if found != num_bytes:
                raise LowmemError(f"{path / name}: damaged: {found} bytes where the manifest has {num_bytes}.")
            if _checksum(path / name) != checksum:
                raise LowmemError(f"{path / name}: damaged: its checksum is not the manifest's.")
        except OSError as error:
            raise LowmemError(f"{path / name}: {error.strerror or error}.") from None


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    payloads = {
        MODEL: safetensors.torch.save(checkpoint.model),
        OPTIMIZER: safetensors.torch.save(checkpoint.optimizer),
        STATE: checkpoint.state.model_dump_json(indent=2).encode(),
    }
    manifest = {}
    for name, payload in payloads.items():
        _write_flushed(folder / name, payload)
        manifest[name] = {"bytes": len(payload), "blake2b": hashlib.blake2b(payload).hexdigest()}
    _write_flushed(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    _flush_folder(folder)
    verify_checkpoint(folder)


def _write_flushed(path: Path, payload: bytes) -> None:
    with open(path, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename inside the folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _checkpoint_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _remove_old(folder: Path) -> None:
    for path in _checkpoint_folders(folder)[:-NUM_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)
