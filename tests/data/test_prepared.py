"""Images shrunk once: the same pixels whatever the cache holds, a cache that keeps to its limit, and what is refused."""

import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import PIL
import pytest
from PIL import Image

from lowmem.data import prepared
from lowmem.data import shrunk as shrinking
from lowmem.data.augment import Draws, augmented, evaluated
from lowmem.data.folder import open_dataset
from lowmem.data.loader import Loader
from lowmem.data.pixels import EvalPixels, TrainPixels
from lowmem.data.prepared import detail_warning, open_cache, prepared_keys, with_prepared
from lowmem.data.shrunk import Cache, PreparedImages, ShrunkEachTime, content_of, entry_key, shrunk
from lowmem.errors import LowmemError
from lowmem.planning.plan import LoaderPlan
from lowmem.preparation import PrepareRequest, prepare_folder
from lowmem.recipe import DataRecipe, load_recipe
from lowmem.results.classifier import ClassifierInfo
from lowmem.sizes import GIB
from lowmem.training.start import cache_for

AUGMENT = load_recipe("seresnextaa101d_32x8d").augment
PLANS = {
    "inline": LoaderPlan(kind="inline", workers=0),
    "threads": LoaderPlan(kind="threads", workers=2),
    "processes": LoaderPlan(kind="processes", workers=2),
}
NUM = 12


def photo(seed, size=(120, 90)):
    """Smooth colours with some noise, as a photograph has."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for index in range(NUM):
        path = root / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo(index, (50, 40) if index >= NUM - 2 else (120, 90)).save(path, quality=90)
    return open_dataset(root, 0.2, 0)


@pytest.fixture
def cache(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("cache"), GIB)


def names(dataset):
    return [*dataset.train.names(), *dataset.val.names()]


def files(cache):
    return sorted(path for path in cache.folder.glob("??/*"))


def stream(split, plan="inline", before_batch=lambda: None):
    """Hash of two epochs' training pixels."""
    digest = hashlib.sha256()
    with Loader(split, TrainPixels(split, AUGMENT, 32, 0), 32, 4, PLANS[plan], shuffle_seed=0) as loader:
        for epoch in (1, 2):
            for batch in loader.batches(epoch):
                before_batch()
                digest.update(batch.images_BHWC.numpy().tobytes())
    return digest.hexdigest()


def test_pixels_are_the_same_warm_cold_elsewhere_evicted_and_without_a_cache(dataset, cache, tmp_path):
    reference = stream(with_prepared(dataset, 64, cache).train)
    warm = with_prepared(dataset, 64, cache).train
    elsewhere = with_prepared(dataset, 64, Cache(tmp_path / "elsewhere", GIB)).train

    def evict():
        for path in files(cache)[::2]:
            path.unlink()

    def damage():
        for path in files(cache)[::2]:
            path.write_bytes(path.read_bytes()[:-40] + bytes(40))

    evict_all = [stream(warm, plan, evict) for plan in PLANS]
    assert {stream(warm), stream(elsewhere), *evict_all, stream(warm, "inline", damage)} == {reference}
    for path in files(cache):
        path.unlink()
    assert stream(warm, "processes") == reference and files(cache)
    one_by_one = stream(prepared.replace(dataset.train, reader=ShrunkEachTime(64)))
    assert one_by_one == reference
    assert reference not in {stream(with_prepared(dataset, 60, cache).train), stream(dataset.train)}


def test_a_cache_that_cannot_be_written_changes_no_pixel(dataset, cache, monkeypatch):
    split = with_prepared(dataset, 64, cache).train
    reference = stream(split)
    for path in files(cache):
        path.unlink()

    def full(*_):
        raise OSError(28, "no space left")

    monkeypatch.setattr(Cache, "keep", full)
    assert stream(split) == reference and not files(cache)
    with pytest.raises(LowmemError, match="--cache .*cannot be written.*make room"):
        with_prepared(dataset, 64, cache)


def test_small_images_are_used_as_they_are_and_large_ones_are_no_larger_than_asked(dataset, cache):
    keys_N = prepared_keys(dataset.root, names(dataset), 64, cache)
    reader = PreparedImages(cache, 64, keys_N)
    sources = [reader(dataset.root / name, index) for index, name in enumerate(names(dataset))]
    as_they_are = [source for source in sources if not isinstance(source, shrinking.Shrunk)]
    assert {path.stem for path in as_they_are} == {"10", "11"} and len(files(cache)) == NUM - 2
    for source in sources:
        if isinstance(source, shrinking.Shrunk):
            with Image.open(shrinking.BytesIO(source.jpeg)) as image:
                assert (image.size, source.width, source.height) == ((64, 48), 120, 90)
                assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4


def save_as(path, mode, **options):
    image = photo(3)
    if mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, quality=95, exif=exif)
    elif mode == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    elif mode == "16 bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8).save(path)
    else:
        image.convert(mode).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix", "size"),
    [
        ("exif", "jpg", (48, 64)),
        ("CMYK", "jpg", (64, 48)),
        ("L", "jpg", (64, 48)),
        ("P", "png", (64, 48)),
        ("transparent", "png", (64, 48)),
        ("16 bit", "png", (64, 48)),
    ],
)
def test_every_kind_of_image_looks_as_it_does_unprepared(tmp_path, mode, suffix, size):
    path = save_as(tmp_path / f"a.{suffix}", mode)
    small = shrunk(path.read_bytes(), 64)
    with Image.open(shrinking.BytesIO(small.jpeg)) as image:
        assert image.size == size and image.mode == "RGB" and not image.getexif()
    plain, through = (evaluated(source, 32, 1.0).astype(float) for source in (path, small))
    assert np.abs(plain - through).mean() < 3
    turned = np.rot90(through)
    assert np.abs(plain - turned).mean() > 10


def test_crops_and_blurs_are_drawn_in_the_originals_pixels(tmp_path):
    photo(5, (640, 480)).resize((640, 480)).filter(PIL.ImageFilter.GaussianBlur(3)).save(tmp_path / "a.png")
    small = shrunk((tmp_path / "a.png").read_bytes(), 320)
    recipe = AUGMENT.model_copy(update={"blur_sigma": (6.0, 6.0)})
    plain, through = (augmented(source, recipe, 48, Draws(0, 1, 0)) for source in (tmp_path / "a.png", small))
    unaware = tmp_path / "unaware.jpg"
    unaware.write_bytes(small.jpeg)  # blurred by 6 of its own pixels, which are 12 of the original's
    apart = np.abs(plain.astype(float) - augmented(unaware, recipe, 48, Draws(0, 1, 0))).mean()
    assert np.abs(plain.astype(float) - through).mean() < 0.5 * apart


def test_the_key_changes_with_everything_that_decides_the_bytes(monkeypatch):
    content = content_of(b"image")
    keys = {entry_key(content, 64), entry_key(content, 65), entry_key(content_of(b"other"), 64)}
    for name, value in (("QUALITY", 90), ("SUBSAMPLING", "4:2:0"), ("GAP", 3), ("LAYOUT", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(shrinking, name, value)
            keys.add(entry_key(content, 64))
    monkeypatch.setattr(PIL, "__version__", "0.1")
    assert len({*keys, entry_key(content, 64)}) == 8


def test_a_second_start_reads_no_image(dataset, cache, monkeypatch):
    first = prepared_keys(dataset.root, names(dataset), 64, cache)
    monkeypatch.setattr(prepared, "content_of", None)
    monkeypatch.setattr(prepared, "longer_side", None)
    assert np.array_equal(prepared_keys(dataset.root, names(dataset), 64, cache), first)
    files(cache)[0].unlink()
    with pytest.raises(LowmemError, match="NoneType"):  # the control: an entry that is missing is made
        prepared_keys(dataset.root, names(dataset), 64, cache)


def test_equal_files_share_an_entry_and_a_changed_file_gets_another(tmp_path, cache):
    for name in ("a.png", "b.png", "c.png"):
        photo(0 if name < "c" else 1).save(tmp_path / name)
    keys_N = prepared_keys(tmp_path, ["a.png", "b.png", "c.png"], 64, cache)
    assert np.array_equal(keys_N[0], keys_N[1]) and not np.array_equal(keys_N[0], keys_N[2])
    photo(2).save(tmp_path / "a.png")
    assert not np.array_equal(prepared_keys(tmp_path, ["a.png"], 64, cache)[0], keys_N[0])
    for path in files(cache):
        path.unlink()
    with pytest.raises(ValueError, match="changed while the run went on"):
        PreparedImages(cache, 64, keys_N)(tmp_path / "a.png", 0)


def test_the_longest_unused_are_evicted_and_never_the_images_at_hand(tmp_path, cache):
    for index in range(9):
        photo(index).save(tmp_path / f"{index}.png")
    groups = [[f"{index}.png" for index in range(start, start + 3)] for start in (0, 3, 6)]
    ages = {}
    for age, group in zip((300, 200), groups):
        before = set(files(cache))
        prepared_keys(tmp_path, group, 64, cache)
        ages[age] = set(files(cache)) - before
        for path in ages[age]:
            os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    total = sum(path.stat().st_size for path in files(cache))
    bounded = Cache(cache.folder, int(1.2 * total))
    prepared_keys(tmp_path, groups[2], 64, bounded)
    left = set(files(cache))
    assert not ages[300] <= left and ages[200] <= left  # the oldest have gone
    assert sum(path.stat().st_size for path in left) <= bounded.limit_bytes
    for path in left:
        os.utime(path, (path.stat().st_atime - 100, path.stat().st_mtime - 100))
    prepared_keys(tmp_path, groups[0] + groups[1], 64, bounded)
    assert sum(path.stat().st_size for path in files(cache)) <= bounded.limit_bytes


def test_images_that_do_not_fit_are_refused_with_the_size_that_does(dataset, cache):
    whole = prepared_keys(dataset.root, names(dataset), 64, cache)
    total = sum(path.stat().st_size for path in files(cache))
    with pytest.raises(LowmemError, match=r"--cache-bytes .* is too small: .*Use --cache-bytes .*M, or a smaller"):
        prepared_keys(dataset.root, names(dataset), 64, Cache(cache.folder, total - 1))
    assert sum(path.stat().st_size for path in files(cache)) < total
    assert np.array_equal(prepared_keys(dataset.root, names(dataset), 64, Cache(cache.folder, total)), whole)


def test_what_workers_make_again_keeps_to_the_limit(dataset, cache):
    keys_N = prepared_keys(dataset.root, names(dataset), 64, cache)
    sizes = [path.stat().st_size for path in files(cache)]
    for path in files(cache):
        path.unlink()
    reader = PreparedImages(Cache(cache.folder, sum(sizes) // 2), 64, keys_N)
    for index, name in enumerate(names(dataset)):
        reader(dataset.root / name, index)
    assert 0 < sum(path.stat().st_size for path in files(cache)) <= sum(sizes) // 2


def test_ctrl_c_keeps_what_there_is(dataset, cache, monkeypatch):
    monkeypatch.setattr(prepared, "CHUNK", 4)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared_keys(dataset.root, names(dataset), 64, cache, stop)
    kept = {path: path.stat().st_ino for path in files(cache)}
    assert kept
    prepared_keys(dataset.root, names(dataset), 64, cache)
    assert all(path.stat().st_ino == inode for path, inode in kept.items()) and len(files(cache)) == NUM - 2


def test_two_runs_can_make_the_same_entries_at_once(dataset, cache):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(prepared_keys(dataset.root, names(dataset), 64, cache)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(np.array_equal(found[0], keys) for keys in found)
    assert len(files(cache)) == NUM - 2 and not list(cache.folder.rglob("*.partial"))


def test_nothing_is_written_into_the_data_folder(dataset, cache):
    before = sorted(dataset.root.rglob("*"))
    with_prepared(dataset, 64, cache)
    with pytest.raises(LowmemError, match="lies in the data folder"):
        with_prepared(dataset, 64, Cache(dataset.root / "cache", GIB))
    assert sorted(dataset.root.rglob("*")) == before


def test_a_cache_is_refused_where_the_recipe_shrinks_nothing(tmp_path):
    plain = load_recipe("quickstart")
    assert cache_for(plain, None, None) is None
    for given in ((tmp_path, None), (None, "3G")):
        with pytest.raises(LowmemError, match=r"--set data\.max_side=256"):
            cache_for(plain, *given)
    shrinks = load_recipe("quickstart", ("data.max_side=300",))
    assert cache_for(shrinks, tmp_path, "3G") == Cache(tmp_path, 3 * GIB)
    before = Cache(tmp_path / "before", 5 * GIB)
    assert cache_for(shrinks, None, None, before) == before and cache_for(shrinks, None, None) == open_cache()
    assert cache_for(plain, None, None, before) is None


def test_sizes_below_the_training_size_are_refused_and_those_near_it_warned_of():
    with pytest.raises(LowmemError, match="max_side 127 is less than train_px 128"):
        load_recipe("quickstart", ("data.max_side=127",))
    assert detail_warning(DataRecipe(train_px=128, val_px=200)) is None
    assert "data.max_side=286" in detail_warning(DataRecipe(train_px=128, val_px=200, max_side=285))
    assert detail_warning(DataRecipe(train_px=128, val_px=200, max_side=286)) is None


def test_a_classifier_sees_new_images_as_the_validation_did(dataset, cache):
    val = with_prepared(dataset, 64, cache).val
    alone = prepared.replace(dataset.val, reader=ShrunkEachTime(64))
    assert ClassifierInfo.model_fields["max_side"].default == 0
    for index in range(len(val)):
        ours, theirs, unshrunk = (EvalPixels(split, 32, 0.9)(0, index) for split in (val, alone, dataset.val))
        assert np.array_equal(ours, theirs)
        assert np.array_equal(ours, unshrunk) == (max(Image.open(dataset.val.path(index)).size) <= 64)


def test_workers_need_neither_torch_nor_a_database():
    code = "import sys, lowmem.data.shrunk; print([m for m in ('torch', 'pydantic', 'sqlite3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_prepare_tells_what_is_shrunk_and_what_to_type(dataset, cache, capsys):
    prepare_folder(PrepareRequest(dataset.root, 64, cache.folder))
    told = " ".join(capsys.readouterr().out.split())
    assert f"{NUM - 2} of {NUM} images are read shrunk" in told
    assert f"lowmem train --data {dataset.root} --set data.max_side=64 --cache {cache.folder}" in told
    assert len(files(cache)) == NUM - 2
