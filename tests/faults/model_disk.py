"""A disk that can be stopped before any of its calls, and a model of what a power loss leaves of the calls before.

The model follows POSIX: a file's bytes are durable after its own sync, a name after the sync of its folder; what is not durable
may be there, be missing, or be there torn or full of zeros. A rename is one step. Every call also happens for real, so that the
code under test reads what it wrote.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lowmem.disk import Bytes, Disk, OpenFile, _RealFile


class Crash(BaseException):
    """The process is gone. Not an Exception: nothing may handle it."""


@dataclass
class FileNode:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""

    def after_loss(self, choice: str) -> bytes:
        lost = bytes(self.data[len(self.durable) :])
        kept = {"empty": b"", "torn": lost[: len(lost) // 2], "zeros": bytes(len(lost)), "kept": lost}[choice]
        return self.durable + kept


@dataclass
class FolderNode:
    entries: dict[str, "Node"] = field(default_factory=dict)
    durable: dict[str, "Node"] = field(default_factory=dict)
    pending: list[Callable[[dict[str, "Node"]], object]] = field(default_factory=list)

    def change(self, what: Callable[[dict[str, "Node"]], object]) -> None:
        what(self.entries)
        self.pending.append(what)


Node = FileNode | FolderNode
FATES = ("empty", "torn", "zeros", "kept")


@dataclass
class ModelDisk(Disk):
    """Works in `root`. Before call number `stop_at` (from 1) it raises `stop_with`; a write does half of itself first."""

    root: Path
    stop_at: int = 0
    stop_with: Callable[[], BaseException] = Crash
    syncs: bool = True
    """False drops every sync, as a program without them would: the negative control."""
    only_once: bool = True
    calls: list[str] = field(default_factory=list)
    tree: FolderNode = field(default_factory=FolderNode)

    def __post_init__(self) -> None:
        self.tree = _durable_tree(self.root)

    def mkdir(self, path: Path) -> None:
        self.call(f"mkdir {path.name}")
        super().mkdir(path)
        self._parent(path).change(lambda entries, node=FolderNode(): entries.__setitem__(path.name, node))

    def create(self, path: Path) -> OpenFile:
        self.call(f"create {path.name}")
        node = FileNode()
        self._parent(path).change(lambda entries: entries.__setitem__(path.name, node))
        return _ModelFile(self, path, node)

    def sync_folder(self, path: Path) -> None:
        self.call(f"sync {path.name}/")
        node = self._folder(path)
        if self.syncs:
            node.durable, node.pending = dict(node.entries), []

    def rename(self, old: Path, new: Path) -> None:
        self.call(f"rename {old.name} {new.name}")
        super().rename(old, new)
        assert old.parent == new.parent
        self._parent(old).change(lambda entries: _move(entries, old.name, new.name))

    def unlink(self, path: Path) -> None:
        self.call(f"unlink {path.name}")
        super().unlink(path)
        self._parent(path).change(lambda entries: entries.pop(path.name, None))

    def rmdir(self, path: Path) -> None:
        self.call(f"rmdir {path.name}")
        super().rmdir(path)
        self._parent(path).change(lambda entries: entries.pop(path.name, None))

    def call(self, what: str) -> None:
        """Count a call; raises where the disk is to stop."""
        self.calls.append(what)
        if self.stops_now():
            raise self.stop_with()

    def stops_now(self) -> bool:
        return len(self.calls) == self.stop_at or (not self.only_once and 0 < self.stop_at <= len(self.calls))

    def _parent(self, path: Path) -> FolderNode:
        return self._folder(path.parent)

    def _folder(self, path: Path) -> FolderNode:
        node: Node = self.tree
        for part in path.relative_to(self.root).parts:
            assert isinstance(node, FolderNode)
            node = node.entries[part]
        assert isinstance(node, FolderNode)
        return node


class _ModelFile:
    def __init__(self, disk: ModelDisk, path: Path, node: FileNode) -> None:
        self.disk, self.path, self.node, self.real = disk, path, node, _RealFile(path)

    def write(self, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        self.disk.calls.append(f"write {self.path.name}")
        if self.disk.stops_now():
            self._add(view[: len(view) // 2])
            raise self.disk.stop_with()
        self._add(view)

    def sync(self) -> None:
        self.disk.call(f"sync {self.path.name}")
        if self.disk.syncs:
            self.node.durable = bytes(self.node.data)

    def close(self) -> None:
        self.real.close()

    def _add(self, view: memoryview) -> None:
        self.real.write(view)
        self.node.data += view


def power_losses(disk: ModelDisk, draw: random.Random, num_random: int) -> Iterator[FolderNode]:
    """Trees that a power loss may leave: nothing but what is durable, all names over each fate of the bytes, random mixtures."""
    yield _after(disk.tree, lambda pending: [], lambda: "empty")
    for fate in FATES:
        yield _after(disk.tree, lambda pending: pending, lambda fate=fate: fate)
    for _ in range(num_random):
        yield _after(disk.tree, lambda pending: [p for p in pending if draw.random() < 0.5], lambda: draw.choice(FATES))


def materialise(tree: FolderNode, folder: Path) -> None:
    """Write a tree into a new folder."""
    folder.mkdir(parents=True)
    for name, node in tree.entries.items():
        if isinstance(node, FolderNode):
            materialise(node, folder / name)
        else:
            (folder / name).write_bytes(node.data)


def _after(tree: FolderNode, chosen: Callable[[list], list], fate: Callable[[], str]) -> FolderNode:
    entries = dict(tree.durable)
    for change in chosen(tree.pending):
        change(entries)
    result = FolderNode()
    for name, node in entries.items():
        if isinstance(node, FolderNode):
            result.entries[name] = _after(node, chosen, fate)
        else:
            result.entries[name] = FileNode(bytearray(node.after_loss(fate())))
    return result


def _durable_tree(folder: Path) -> FolderNode:
    node = FolderNode()
    for path in folder.iterdir():
        data = b"" if path.is_dir() else path.read_bytes()
        node.entries[path.name] = _durable_tree(path) if path.is_dir() else FileNode(bytearray(data), data)
    node.durable = dict(node.entries)
    return node


def _move(entries: dict[str, Node], old: str, new: str) -> None:
    """A rename whose source never became durable does nothing."""
    if old in entries:
        entries[new] = entries.pop(old)
