"""Make the embedded images again from Debian's package openclipart-png.

    python tools/make_clipart10.py --out clipart10            # downloads the package with apt-get (131 MB)
    python tools/make_clipart10.py --out clipart10 --package openclipart-png_0.18+dfsg-19_all.deb

The shipped set names each picture by the first 12 digits of the MD5 of its PNG file in the package; a picture belongs to val where
the first 8 digits, as a number, are divisible by 5. This script finds those files, pastes them on white, shrinks them to 128 px
and saves them as JPEG of quality 85, then compares with the shipped set: the same 500 files and classes, and pixels that differ
by 1 to 2 levels of 255 on average (the shipped ones were shrunk by another version of Pillow, some to a size one pixel off).
"""

import argparse
import hashlib
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

SHIPPED = Path(__file__).parent.parent / "lowmem" / "samples" / "clipart10"
SOURCES = {
    "birds": "animals/birds",
    "bugs": "animals/bugs",
    "mammals": "animals/mammals",
    "fruit": "food/fruit",
    "desserts": "food/desserts",
    "flowers": "plants/flowers",
    "vehicles": "transportation/vehicles",
    "music": "recreation/music",
    "smilies": "people/smilies",
    "homes": "buildings/homes",
}
INSIDE = Path("usr/share/openclipart/png")
LONG_SIDE_PX, QUALITY = 128, 85


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder to make")
    options.add_argument("--package", type=Path, help="the .deb file; without it, apt-get download fetches it")
    chosen = options.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as scratch:
        package = chosen.package or download(Path(scratch))
        subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
        num_made = make(Path(scratch) / INSIDE, chosen.out)
    print(f"{num_made} images made in {chosen.out}")
    compare(chosen.out)


def download(folder: Path) -> Path:
    subprocess.run(["apt-get", "download", "openclipart-png"], cwd=folder, check=True)
    return next(folder.glob("*.deb"))


def make(source: Path, out: Path) -> int:
    """Write every picture of the shipped set; returns how many were found."""
    wanted = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.jpg")}
    num_made = 0
    for label, folder in SOURCES.items():
        for path in sorted((source / folder).rglob("*.png")):
            digest = hashlib.md5(path.read_bytes()).hexdigest()
            name = f"{split_of(digest)}/{label}/{digest[:12]}.jpg"
            target = out / name
            if name in wanted and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shrunk(path).save(target, quality=QUALITY)
                num_made += 1
    return num_made


def split_of(digest: str) -> str:
    return "val" if int(digest[:8], 16) % 5 == 0 else "train"


def shrunk(path: Path) -> Image.Image:
    """The picture on white, at most 128 pixels on its long side."""
    rgba = Image.open(path).convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    white.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX))
    return white


def compare(out: Path) -> None:
    """Print how the images in `out` differ from the shipped ones."""
    shipped = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.jpg")}
    made = {path.relative_to(out).as_posix() for path in out.rglob("*.jpg")}
    print(f"shipped but not made: {len(shipped - made)}; made but not shipped: {len(made - shipped)}")
    gaps, resized = [], 0
    for name in sorted(shipped & made):
        one, other = (np.asarray(Image.open(root / name).convert("RGB"), dtype=float) for root in (SHIPPED, out))
        if one.shape == other.shape:
            gaps.append(np.abs(one - other).mean())
        else:
            resized += 1
    print(
        f"mean absolute difference of a pixel: median {np.median(gaps):.2f} of 255, largest {np.max(gaps):.2f}; of another size: {resized}"
    )


if __name__ == "__main__":
    main()
