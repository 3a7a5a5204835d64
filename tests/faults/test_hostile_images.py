"""F11: hostile images end neither the check nor a run, and are named."""

import os
from pathlib import Path

import pytest
from PIL import Image

from lowmem.data.decode import why_unreadable
from tests.faults import hostile_images


def test_every_hostile_image_is_named_or_read(tmp_path: Path) -> None:
    score = hostile_images.try_files(tmp_path, seed=0)
    assert score.failures == [] and score.survived == score.injected >= 250
    assert 100 <= score.named < score.injected, "neither all nor none"


def test_what_pillow_verifies_alone_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""

    def verified(path: Path) -> str | None:
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as error:
            return repr(error)
        return None

    monkeypatch.setattr(hostile_images, "why_unreadable", verified)
    score = hostile_images.try_files(tmp_path, seed=0)
    assert any(failure.startswith("truncated.jpg") for failure in score.failures)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_what_is_no_file_does_not_hang_the_check(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert all(why_unreadable(tmp_path / name) for name in ("pipe.jpg", "zeros.jpg", "loop.jpg"))
