"""F5: ways to damage a checkpoint, and the count of those that are noticed."""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoints

Mutation = Callable[[Path, Path, random.Random], None]
"""(damaged checkpoint, older checkpoint, draw): change files of the first."""


def flip_bit(folder: Path, older: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, older: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def zero_tail(folder: Path, older: Path, draw: random.Random) -> None:
    """What some file systems leave after a power loss: the length is right, the end is zeros."""
    file = _file(folder, draw)
    data = bytearray(file.read_bytes().rstrip(b"\0"))
    start = draw.randrange(len(data))
    size = file.stat().st_size
    file.write_bytes(bytes(data[:start]) + bytes(size - start))


def append(folder: Path, older: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def remove_file(folder: Path, older: Path, draw: random.Random) -> None:
    _file(folder, draw).unlink()


def swap_two_files(folder: Path, older: Path, draw: random.Random) -> None:
    a, b = draw.sample(sorted(folder.iterdir()), 2)
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def take_from_older(folder: Path, older: Path, draw: random.Random) -> None:
    """A valid file of another checkpoint: only a checksum of the whole notices."""
    file = _file(folder, draw)
    shutil.copyfile(older / file.name, file)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bit, flip_bit, flip_bit, truncate, zero_tail, append, remove_file, swap_two_files, take_from_older,
)  # fmt: skip


@dataclass
class Score:
    """`survived` counts damaged checkpoints that were refused, named, and passed over for the older good one."""

    injected: int = 0
    survived: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        return vars(self) | {"by_kind": dict(self.by_kind)}


def damage_checkpoints(scratch: Path, older: Path, newer: Path, num: int, seed: int) -> Score:
    """Damage `newer` beside `older` in `num` ways and look for the newest good one each time."""
    draw, score = random.Random(seed), Score()
    folder = scratch / "checkpoints"
    while score.injected < num:
        mutate = MUTATIONS[score.injected % len(MUTATIONS)]
        shutil.rmtree(folder, ignore_errors=True)
        for path in (older, newer):
            shutil.copytree(path, folder / path.name)
        damaged = folder / newer.name
        mutate(damaged, older, draw)
        if _contents(damaged) == _contents(newer):  # zeros over zeros
            continue
        score.injected += 1
        score.by_kind[mutate.__name__] += 1
        problem = _outcome(folder, older, newer)
        if problem:
            score.failures.append(f"{mutate.__name__}: {problem}")
        else:
            score.survived += 1
    return score


def _outcome(folder: Path, older: Path, newer: Path) -> str:
    """Empty where the older checkpoint takes over and the damaged one is named."""
    try:
        path, found, problems = Checkpoints(folder).newest()
    except LowmemError as error:
        return f"nothing was found: {error}"
    if path.name != older.name:
        return f"{path.name} was taken"
    return "" if len(problems) == 1 and newer.name in problems[0] else "nobody was told"


def _file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
