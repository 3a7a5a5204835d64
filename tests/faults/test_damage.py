"""F5, F8, F15: checkpoints that were damaged, forged, or made to hurt."""

import hashlib
import json
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoints, read_checkpoint
from lowmem.training.schedule import ScheduleState
from lowmem.training.state import RunState
from tests.faults.damage import damage_checkpoints, flip_bit
from tests.training.test_checkpoint import checkpoint


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """An older and a newer checkpoint that differ in every file."""
    kept = Checkpoints(tmp_path / "source")
    return kept.write(checkpoint(1)), kept.write(checkpoint(2))


def reseal(folder: Path) -> None:
    """Make the manifest fit the files again, as somebody would who forges a checkpoint."""
    files = {
        path.name: {"bytes": path.stat().st_size, "blake2b": hashlib.blake2b(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def test_damage_is_found_and_the_older_checkpoint_takes_over(tmp_path: Path, two: tuple[Path, Path]) -> None:
    score = damage_checkpoints(tmp_path / "work", *two, num=300, seed=0)
    assert score.failures == [] and score.survived == score.injected == 300 and len(score.by_kind) == 7


@pytest.mark.fault
def test_ten_thousand_damages(tmp_path: Path, two: tuple[Path, Path]) -> None:
    score = damage_checkpoints(tmp_path / "work", *two, num=10_000, seed=1)
    assert score.failures == [] and score.survived == 10_000


def test_every_bit_of_a_manifest_counts(two: tuple[Path, Path]) -> None:
    file = two[1] / "manifest.json"
    good = file.read_bytes()
    for position in range(len(good)):
        for bit in range(0 if position % 8 == 0 else 5, 8):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            with pytest.raises(LowmemError, match=two[1].name):
                read_checkpoint(two[1])
    file.write_bytes(good)
    read_checkpoint(two[1])


def test_the_library_alone_would_not_notice(tmp_path: Path, two: tuple[Path, Path]) -> None:
    """The negative control: flipped bits in the data pass safetensors by."""
    file = two[1] / "model.safetensors"
    good, unnoticed = file.read_bytes(), 0
    for position in range(len(good) - 40, len(good)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        safetensors.torch.load_file(file)
        unnoticed += 1
    assert unnoticed == 40
    flip_bit(two[1], two[0], random.Random(0))


def fields_of_the_state() -> list[tuple[str, ...]]:
    schedule = [("schedule", name) for name in ScheduleState.model_fields]
    return [(name,) for name in RunState.model_fields] + schedule


@pytest.mark.parametrize("path", fields_of_the_state(), ids=".".join)
def test_a_field_of_the_state_that_is_missing_or_wrong_is_named(two: tuple[Path, Path], path: tuple[str, ...]) -> None:
    file = two[1] / "state.json"
    good = json.loads(file.read_text())
    for value in (
        "REMOVED",
        "text" if path[-1] != "dataset" else 7,
        -1,
        [["x"]],
        {"x": {}},
        float("nan"),
        float("inf"),
    ):
        tree: Any = json.loads(json.dumps(good))
        part = tree if len(path) == 1 else tree[path[0]]
        if value == "REMOVED":
            del part[path[-1]]
        else:
            part[path[-1]] = value
        file.write_text(json.dumps(tree))
        with pytest.raises(LowmemError, match="state.json: damaged"):
            read_checkpoint(two[1])
        reseal(two[1])
        with pytest.raises(LowmemError) as told:
            read_checkpoint(two[1])
        assert path[-1] in str(told.value) or "JSON" in str(told.value) and isinstance(value, float), value
    file.write_text(json.dumps(good))
    reseal(two[1])
    assert read_checkpoint(two[1]).state == checkpoint(2).state


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("losses",), [0.5]),
        (("step",), 1),
        (("seed",), 1),
        (("epoch",), 0),
        (("finished",), True),
        (("schedule", "best_epoch"), 2),
        (("schedule", "best_accuracy"), 0.5),
        (("schedule", "best_accuracy"), 1.5),
        (("schedule", "best_accuracy_loss"), 0.5),
        (("schedule", "best_loss"), 0.5),
        (("schedule", "epochs_without_decay"), 2),
        (("schedule", "epochs_without_improvement"), 7),
        (("recipe", "optimizer", "lr"), -1),
        (("recipe", "optimizer", "Ir"), 1),
        (("scaler",), {"scale": float("nan")}),
        (("unknown",), 1),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    two: tuple[Path, Path], path: tuple[str, ...], value: Any
) -> None:
    file = two[1] / "state.json"
    tree = part = json.loads(file.read_text())
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file.write_text(json.dumps(tree))
    reseal(two[1])
    with pytest.raises(LowmemError) as told:
        read_checkpoint(two[1])
    assert any(name in str(told.value) for name in (path[-1], "schedule", "losses"))


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE_TENSORS = {
    "empty": b"",
    "short": b"\x01",
    "giant_header": struct.pack("<Q", 2**62) + b"{}",
    "header_past_the_end": struct.pack("<Q", 10**6) + b"{}",
    "not_json": header(b"\xff\xfe{"),
    "nested": header(b"[" * 100_000),
    "negative_offsets": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
    "overlap": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "huge_shape": header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}') + bytes(4),
    "unknown_dtype": header(b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
    "path_as_name": b"../../evil",
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
@pytest.mark.parametrize("which", ["model.safetensors", "optimizer.safetensors"])
def test_hostile_tensor_files_are_a_typed_error(two: tuple[Path, Path], name: str, which: str) -> None:
    (two[1] / which).write_bytes(HOSTILE_TENSORS[name])
    reseal(two[1])
    with pytest.raises(LowmemError, match=two[1].name):
        read_checkpoint(two[1])


@pytest.mark.parametrize("which", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_is_never_run(tmp_path: Path, two: tuple[Path, Path], which: str) -> None:
    mark = tmp_path / "executed"
    data = pickle.dumps(Payload(mark))
    (two[1] / which).write_bytes(data)
    if which != "manifest.json":
        reseal(two[1])
    with pytest.raises(LowmemError):
        read_checkpoint(two[1])
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "the payload works"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 200_000,
        b"null",
        b"[]",
        b'{"format": 1}',
        b'{"format": 1, "files": []}',
        b'{"format": 99, "files": {}}',
        b'{"format": 1, "files": {"../../../etc/passwd": {"bytes": 1, "blake2b": ""}}}',
        b'{"format": 1, "files": {"/etc/passwd": {"bytes": 1, "blake2b": ""}}}',
        b'{"format": 1, "files": {"model.safetensors": {"bytes": 1e999, "blake2b": ""}}}',
        b'{"format": 1, "files": {"model.safetensors": {"bytes": {}, "blake2b": ""}}}',
    ],
)
def test_hostile_manifests_are_a_typed_error(two: tuple[Path, Path], text: bytes) -> None:
    (two[1] / "manifest.json").write_bytes(text)
    with pytest.raises(LowmemError, match="manifest.json"):
        read_checkpoint(two[1])
    path, _, problems = Checkpoints(two[1].parent).newest()
    assert path == two[0] and len(problems) == 1


@pytest.mark.parametrize("text", [b"", b"[" * 200_000, b"null", b"[]", b'"x"', b'{"schedule": []}', b"\xff"])
def test_hostile_states_are_a_typed_error(two: tuple[Path, Path], text: bytes) -> None:
    (two[1] / "state.json").write_bytes(text)
    reseal(two[1])
    with pytest.raises(LowmemError, match="state.json"):
        read_checkpoint(two[1])


def test_folders_beside_the_checkpoints_are_never_followed(tmp_path: Path, two: tuple[Path, Path]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    try:
        (two[0].parent / "000009-epoch9-step0").symlink_to(outside, target_is_directory=True)
        (two[0].parent / ".000001-epoch1-step1.partial").symlink_to(outside, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    kept = Checkpoints(two[0].parent)
    assert kept.newest()[0] == two[1]
    kept.write(checkpoint(3))
    kept.write(checkpoint(4))
    assert (outside / "file").read_text() == "mine"
