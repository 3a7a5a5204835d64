import numpy as np
import pytest
from PIL import Image

from lowmem.data.augment import evaluated
from lowmem.data.decode import oriented_size, resized_crop, to_rgb, why_unreadable


def gradient(width=60, height=40):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_shows_the_picture_upright(tmp_path, orientation):
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = gradient()
    stored = upright if undo[orientation] is None else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert oriented_size(image) == (60, 40)
        assert np.array_equal(np.asarray(resized_crop(image, (0, 0, 60, 40), 60, 40)), np.asarray(upright))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA", "PA", "I;16", "I", "F", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode):
    picture = gradient().convert("L")
    if mode == "I;16":
        image = Image.fromarray((np.asarray(picture).astype(np.uint16)) << 8)
    elif mode == "I":
        image = Image.fromarray(np.asarray(picture).astype(np.int32) << 8)
    elif mode == "PA":
        image = gradient().convert("P").convert("PA")
    else:
        image = gradient().convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (60, 40)
    assert np.asarray(rgb).std() > 20, "the picture is still there"


def test_transparency_is_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert np.all(np.asarray(to_rgb(image)) == 255)
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([9] * 768)
    palette.info["transparency"] = 3
    assert np.all(np.asarray(to_rgb(palette)) == 255)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff"])
def test_every_format_is_read(tmp_path, suffix):
    gradient().save(tmp_path / f"a.{suffix}")
    assert why_unreadable(tmp_path / f"a.{suffix}") is None
    assert evaluated(tmp_path / f"a.{suffix}", 16, 1.0).shape == (16, 16, 3)


def test_scaled_decode_is_close_to_the_full_one(tmp_path):
    gradient(800, 600).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        full = np.asarray(image.resize((50, 50), Image.Resampling.BILINEAR), float)
    with Image.open(tmp_path / "a.jpg") as image:
        scaled = np.asarray(resized_crop(image, (0, 0, 800, 600), 50, 50), float)
        assert image.size[0] < 800, "libjpeg's scaling was used"
    assert np.abs(full - scaled).mean() < 1.5


def test_damaged_files_are_found_and_good_ones_are_not(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    good = tmp_path / "good.jpg"
    noise.save(good)
    whole = good.read_bytes()
    assert why_unreadable(good) is None
    bad = tmp_path / "bad.jpg"
    for cut in (0.1, 0.3, 0.5, 0.8, 0.99):
        bad.write_bytes(whole[: int(cut * len(whole))])
        assert why_unreadable(bad), cut
        bad.write_bytes(whole[: int(cut * len(whole))].ljust(len(whole), b"\0"))
        assert why_unreadable(bad), ("zero tail", cut)
    for content in (b"", b"<html></html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"):
        bad.write_bytes(content)
        assert why_unreadable(bad)
    assert why_unreadable(tmp_path / "missing.jpg")
