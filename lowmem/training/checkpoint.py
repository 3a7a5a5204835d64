"""Checkpoints: complete, checksummed, and never seen half-written.

A checkpoint is a folder NUMBER-epochE-stepS with model.safetensors, optimizer.safetensors, state.json, and manifest.json, which
holds the size and BLAKE2b checksum of each of them and is written last. The folder is made under a hidden name, every file and
folder is flushed, and only then is it renamed; it is read back, and only then are older ones removed. So after a kill or a power
loss at any moment there is the old checkpoint or the new one, whole. Numbers only grow: a checkpoint never takes the place of
another. No pickle is written or read. safetensors itself finds truncated files but no flipped bit in the data, hence the checksums.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from lowmem.disk import REAL_DISK, Bytes, Disk, remove_tree, write_file, writing
from lowmem.errors import LowmemError
from lowmem.training.state import RunState, state_from_json
from lowmem.training.tensorfile import num_bytes, tensor_chunks

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1
NUM_KEPT = 2
MAX_JSON_BYTES = 256 * 2**20
"""A state with ten million losses; larger files are hostile."""
NAME = re.compile(r"(\d{6,12})-epoch\d{1,12}-step\d{1,12}")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: contiguous tensors on the CPU and the run's state."""

    state: RunState
    model: Tensors
    optimizer: Tensors

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.model) + num_bytes(self.optimizer)

    def not_finite(self) -> str:
        """Name of the first tensor with a NaN or an infinity; empty where there is none."""
        for tensors in (self.model, self.optimizer):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not _is_finite(tensor):
                    return name
        return ""


@dataclass
class Checkpoints:
    """The checkpoints of one run, under `folder` (RUN/checkpoints)."""

    folder: Path
    disk: Disk = REAL_DISK
    good: list[Path] = field(default_factory=list)
    """Those that this process has written or read, oldest first; all others are older or damaged."""

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write, read back, and then remove all but the newest good two; raises LowmemError, and nothing is lost."""
        state = checkpoint.state
        name = f"{self._next_number():06d}-epoch{state.epoch}-step{state.step}"
        final, partial = self.folder / name, self.folder / f".{name}.partial"
        with writing(final, "the checkpoint", checkpoint.num_bytes, self.disk):
            self._make_folder()
            self._remove_leftovers()
            try:
                self.disk.mkdir(partial)
                _write_files(self.disk, partial, checkpoint)
                self.disk.rename(partial, final)
                self.disk.sync_folder(self.folder)
            except OSError:
                remove_tree(self.disk, partial)
                raise
        verify_checkpoint(final)
        self.good = [*self.good, final][-NUM_KEPT:]
        self._remove_others()
        return final

    def newest(self) -> tuple[Path, Checkpoint, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with newer ones; raises LowmemError if there is none."""
        problems: list[str] = []
        for path in reversed(self.all()):
            try:
                found = read_checkpoint(path)
            except LowmemError as error:
                problems.append(str(error))
                continue
            self.good = [path]
            return path, found, problems
        told = "".join(f"\n  {problem}" for problem in problems)
        raise LowmemError(
            f"{self.folder} holds no checkpoint that can be resumed.{told}\nStart a new run with lowmem train."
        )

    def all(self) -> list[Path]:
        """Every checkpoint folder, damaged ones too, oldest first."""
        if not self.folder.is_dir():
            return []
        folders = [path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink()]
        named = [(NAME.fullmatch(path.name), path) for path in folders]
        return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]

    def _next_number(self) -> int:
        paths = self.all()
        return 1 + int(paths[-1].name.partition("-")[0]) if paths else 1

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.disk.mkdir(self.folder)
            self.disk.sync_folder(self.folder.parent)

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".*-epoch*-step*.*"):
            remove_tree(self.disk, path)

    def _remove_others(self) -> None:
        """Nothing goes before two are good. A checkpoint is renamed before it is taken apart: half of one is never seen."""
        if len(self.good) < NUM_KEPT:
            return
        for path in self.all():
            if path not in self.good:
                hidden = path.with_name(f".{path.name}.old")
                with suppress(OSError):  # somebody has it open: it goes with the next save
                    self.disk.rename(path, hidden)
                    remove_tree(self.disk, hidden)


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, every byte of it checked; raises LowmemError naming the damaged file or field."""
    verify_checkpoint(path)
    try:
        return Checkpoint(
            state_from_json((path / STATE).read_bytes(), str(path / STATE)),
            safetensors.torch.load_file(path / MODEL),
            safetensors.torch.load_file(path / OPTIMIZER),
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise LowmemError(f"{path}: damaged: {error}.") from error


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest; raises LowmemError naming the first that differs."""
    entries = _manifest(path / MANIFEST)
    for name, (size, checksum) in entries.items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise LowmemError(f"{path / name}: damaged: {found} bytes where the manifest has {size}.")
            if name == STATE and found > MAX_JSON_BYTES:
                raise LowmemError(f"{path / name}: {found} bytes are no run's state.")
            if _checksum(path / name) != checksum:
                raise LowmemError(f"{path / name}: damaged: its checksum is not the manifest's.")
        except OSError as error:
            raise LowmemError(f"{path / name}: {error.strerror or error}.") from None


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and checksum by file name; only the names of a checkpoint's own files are taken."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError
        tree: Any = json.loads(path.read_bytes())
        found_format = tree["format"]
        entries = {str(name): (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in tree["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise LowmemError(f"{path}: missing or damaged ({type(error).__name__}).") from None
    if found_format != FORMAT:
        raise LowmemError(f"{path}: format {str(found_format)[:20]}; this lowmem reads format {FORMAT}.")
    if set(entries) != {MODEL, OPTIMIZER, STATE}:
        raise LowmemError(f"{path}: names other files than a checkpoint has.")
    return entries


def _write_files(disk: Disk, folder: Path, checkpoint: Checkpoint) -> None:
    contents: dict[str, Iterable[Bytes]] = {
        MODEL: tensor_chunks(checkpoint.model),
        OPTIMIZER: tensor_chunks(checkpoint.optimizer),
        STATE: [checkpoint.state.to_json().encode()],
    }
    files = {}
    for name, chunks in contents.items():
        digest, sizes = hashlib.blake2b(), []
        write_file(disk, folder / name, _watched(chunks, digest, sizes))
        files[name] = {"bytes": sum(sizes), "blake2b": digest.hexdigest()}
    write_file(disk, folder / MANIFEST, [json.dumps({"format": FORMAT, "files": files}, indent=2).encode()])
    disk.sync_folder(folder)


def _watched(chunks: Iterable[Bytes], digest: Any, sizes: list[int]) -> Iterator[Bytes]:
    for chunk in chunks:
        digest.update(chunk)
        sizes.append(len(chunk))
        yield chunk


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    """In NumPy, since torch would start threads of its own beside those of the training."""
    values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    with np.errstate(all="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())  # a sum may overflow by itself
