"""F14: the images changed between two parts of a run."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import LowmemError
from lowmem.training.resume import ResumeRequest, resume_run
from tests.faults.harness import differing
from tests.faults.stops import EXIT_STOPPED, TinyRun, tiny, whole


def changed(run: TinyRun, photos: Path, folder: Path, change: Any) -> str:
    """The refusal of a resume over images that were changed."""
    copy = folder / "changed"
    shutil.copytree(photos, copy)
    run.photos = copy
    assert run.train(stop_in=(1, 1)) == EXIT_STOPPED
    change(copy)
    with pytest.raises(LowmemError) as told:
        run.resume()
    return str(told.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda root: (root / "1" / "0.png").unlink(), "gone or changed"),
        (lambda root: shutil.copy(root / "1" / "0.png", root / "1" / "x.png"), "new or changed"),
        (lambda root: shutil.move(root / "1" / "0.png", root / "2" / "zero.png"), "zero.png"),
        (lambda root: shutil.copy(root / "1" / "0.png", root / "1" / "1.png"), "1/1.png"),
    ],
)
def test_changed_images_are_refused_with_the_difference(photos: Path, tmp_path: Path, change: Any, line: str) -> None:
    text = changed(tiny(photos, tmp_path), photos, tmp_path, change)
    assert "not those that this run was started with" in text and line in text


def test_the_order_of_listing_changes_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(photos, tmp_path)
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(2, 1)) == EXIT_STOPPED
    copy = tmp_path / "moved"
    for file in sorted(photos.rglob("*.png"), reverse=True):
        (copy / file.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.relative_to(photos))
    _list_backwards(monkeypatch)
    assert resume_run(ResumeRequest(run.out, data=copy)) == 0
    assert differing(expected, run.end()) == []


def _list_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    scandir, listdir, iterdir = os.scandir, os.listdir, Path.iterdir

    class Backwards:
        def __init__(self, path: Any = ".") -> None:
            with scandir(path) as entries:
                self.entries = iter(sorted(entries, key=lambda e: os.fsdecode(e.name), reverse=True))

        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Any:
            return self.entries

        def __next__(self) -> Any:
            return next(self.entries)

        def close(self) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self), reverse=True)))
