import hashlib
import shutil

import numpy as np
import pytest
from PIL import Image

from lowmem.data.folder import (
    class_counts,
    embedded_images,
    labelled_images,
    natural_key,
    open_dataset,
    unlabelled_images,
)
from lowmem.errors import LowmemError


def save(path, seed=0, size=(24, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)


def flat(root, classes=("0", "1", "2", "10"), num=10):
    for number, label in enumerate(classes):
        for index in range(num):
            save(root / label / f"{index}.png", seed=100 * number + index)
    return root


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(split):
    return list(split.names())


def test_embedded_images_are_the_500_of_the_provenance():
    dataset = open_dataset(embedded_images(), 0.2, 0)
    assert (len(dataset.train), len(dataset.val), len(dataset.classes)) == (394, 106, 10)
    assert not dataset.unreadable


def test_classes_in_natural_order(tmp_path, cache):
    dataset = open_dataset(flat(tmp_path / "d"), 0.2, 0, cache_dir=cache)
    assert dataset.classes == ("0", "1", "2", "10")
    assert sorted(["a10", "a2", "B1", "a"], key=natural_key) == ["a", "a2", "a10", "B1"]
    first_of_ten = names(dataset.train)[list(dataset.train.labels).index(3)]
    assert first_of_ten.startswith("10/")


def test_split_is_stratified_seeded_and_blind_to_listing_order(tmp_path, cache):
    root = flat(tmp_path / "d")
    one, again = open_dataset(root, 0.2, 0, cache_dir=cache), open_dataset(root, 0.2, 0, cache_dir=cache)
    assert names(one.val) == names(again.val) and list(one.val.counts(4)) == [2, 2, 2, 2]
    assert not set(names(one.val)) & set(names(one.train))
    assert names(open_dataset(root, 0.2, 1, cache_dir=cache).val) != names(one.val)
    copy = tmp_path / "copy"
    for path in sorted(root.rglob("*.png"), reverse=True):
        (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.parent.name / path.name)
    assert open_dataset(copy, 0.2, 0, cache_dir=cache).fingerprint == one.fingerprint


def test_fingerprint_sees_every_change(tmp_path, cache):
    root = flat(tmp_path / "d")
    before = open_dataset(root, 0.2, 0, cache_dir=cache).fingerprint
    save(root / "0" / "0.png", seed=1, size=(99, 20))
    changed = open_dataset(root, 0.2, 0, cache_dir=cache).fingerprint
    (root / "1" / "3.png").unlink()
    assert len({before, changed, open_dataset(root, 0.2, 0, cache_dir=cache).fingerprint}) == 3


def test_train_val_test_folders(tmp_path, cache):
    flat(tmp_path / "d" / "train")
    flat(tmp_path / "d" / "val", num=2)
    save(tmp_path / "d" / "test" / "b10.png")
    save(tmp_path / "d" / "test" / "b9.png")
    dataset = open_dataset(tmp_path / "d", 0.5, 0, cache_dir=cache)
    assert (len(dataset.train), len(dataset.val)) == (40, 8)
    assert names(dataset.test) == ["test/b9.png", "test/b10.png"] and set(dataset.test.labels) == {-1}


def test_unreadable_files_are_left_out_with_their_reasons(tmp_path, cache):
    root = flat(tmp_path / "d", num=60)
    (root / "0" / "bad.jpg").write_text("<html>")
    (root / "1" / "empty.png").write_bytes(b"")
    for _ in range(2):  # the second time from the cache
        dataset = open_dataset(root, 0.2, 0, cache_dir=cache)
        assert dict(dataset.unreadable) == {"0/bad.jpg": "not an image", "1/empty.png": "the file is empty"}
        assert "0/bad.jpg" not in names(dataset.train) + names(dataset.val)


def test_more_than_one_percent_unreadable_stops_with_the_list(tmp_path, cache):
    root = flat(tmp_path / "d")
    (root / "0" / "bad.jpg").write_text("<html>")
    with pytest.raises(LowmemError, match=r"(?s)1 of 41 images.*0/bad\.jpg: not an image"):
        open_dataset(root, 0.2, 0, cache_dir=cache)


def test_nothing_is_written_under_the_data_folder(tmp_path, cache):
    root = flat(tmp_path / "d")
    state = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}
    open_dataset(root, 0.2, 0, cache_dir=cache)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()} == state


def test_warnings_for_duplicates_imbalance_and_missing_validation(tmp_path, cache):
    root = tmp_path / "d"
    flat(root / "train", ("a", "b"), 20)
    save(root / "train" / "c" / "only.png", seed=7)
    flat(root / "val", ("a",), 1)  # the same pixels as train/a/0.png
    told = " ".join(open_dataset(root, 0.2, 0, cache_dir=cache).warnings)
    assert (
        "1 validation images are also in train" in told
        and "Unbalanced" in told
        and "2 of 3 classes have no validation" in told
    )


def test_class_folders_without_an_image_are_told_of_and_left_out(tmp_path, cache):
    root = flat(tmp_path / "d", ("a", "b", "c"))
    assert not open_dataset(root, 0.2, 0, cache_dir=cache).warnings
    (root / "empty").mkdir()
    (root / "raw").mkdir()
    (root / "raw" / "photo.cr2").write_bytes(b"raw")
    (root / ".hidden").mkdir()
    dataset = open_dataset(root, 0.2, 0, cache_dir=cache)
    assert dataset.classes == ("a", "b", "c") and len(dataset.warnings) == 1
    assert "2 of 5: empty, raw. Images end in .bmp" in dataset.warnings[0]


def test_a_class_that_is_empty_in_train_and_val_is_told_of_and_one_empty_in_val_otherwise(tmp_path, cache):
    root = tmp_path / "d"
    flat(root / "train", ("a", "b"))
    flat(root / "val", ("a",), 1)
    for name in ("train/c", "val/c", "val/b"):
        (root / name).mkdir(parents=True)
    told = open_dataset(root, 0.2, 0, cache_dir=cache).warnings
    assert "1 of 3: c." in told[0] and "1 of 2 classes have no validation image (b)" in told[1]


def test_a_class_of_which_no_image_can_be_read_is_refused(tmp_path, cache):
    root = flat(tmp_path / "d", ("a", "b"), 60)
    save(root / "c" / "only.png")
    open_dataset(root, 0.2, 0, cache_dir=cache)
    (root / "c" / "only.png").write_text("<html>")
    with pytest.raises(LowmemError, match="none of the training images of class c can be read"):
        open_dataset(root, 0.2, 0, cache_dir=cache)


def test_counts_of_each_class_are_told(tmp_path, cache):
    root = flat(tmp_path / "d", ("a", "b"), 10)
    assert class_counts(open_dataset(root, 0.2, 0, cache_dir=cache)) == "a 8+2, b 8+2"
    for number in range(21):
        flat(root, (f"c{number}",), 2)
    told = class_counts(open_dataset(root, 0.2, 0, cache_dir=cache))
    assert told.startswith("c0 1+1") and told.endswith("a 8+2, b 8+2") and "c9" not in told and len(told) < 100


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.write_text("x"), "is a file"),
        (lambda root: root.mkdir(), "no images in class folders"),
        (lambda root: flat(root, ("only",)), "one class only"),
        (lambda root: save(root / "loose.png"), "no images in class folders"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, cache, make, expected):
    root = tmp_path / "d"
    make(root)
    with pytest.raises(LowmemError, match=expected):
        open_dataset(root, 0.2, 0, cache_dir=cache)


def test_a_validation_class_without_training_images_is_refused(tmp_path, cache):
    flat(tmp_path / "d" / "train", ("a", "b"))
    flat(tmp_path / "d" / "val", ("a", "c"), 1)
    with pytest.raises(LowmemError, match="val/c has images but train/c has none"):
        open_dataset(tmp_path / "d", 0.2, 0, cache_dir=cache)


def test_labelled_and_unlabelled_folders(tmp_path):
    root = flat(tmp_path / "d", ("a", "b"), 2)
    split = labelled_images(root, ("b", "a", "z"))
    assert names(split) == ["b/0.png", "b/1.png", "a/0.png", "a/1.png"] and list(split.labels) == [0, 0, 1, 1]
    with pytest.raises(LowmemError, match="'b' is not a class"):
        labelled_images(root, ("a",))
    assert len(unlabelled_images(root)) == 4 and names(unlabelled_images(root / "a" / "0.png")) == ["0.png"]
    with pytest.raises(LowmemError, match="holds no images"):
        unlabelled_images(tmp_path / "nothing")
