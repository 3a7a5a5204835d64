"""Machine: the facts of this computer that a run records and that a plan may depend on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from lowmem.errors import LowmemError
from lowmem.sizes import format_size

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "pillow-simd", "lowmem")


class Card(BaseModel):
    """One CUDA device."""

    model_config = ConfigDict(frozen=True)

    index: int
    name: str
    total_bytes: int
    capability: tuple[int, int]
    driver: str | None = None


class Machine(BaseModel):
    """What this computer has."""

    model_config = ConfigDict(frozen=True)

    system: str
    processor: str
    cores: int
    """Cores that this process may use."""
    ram_bytes: int
    python: str
    packages: dict[str, str]
    cards: tuple[Card, ...] = ()


def this_machine() -> Machine:
    """The facts of the computer that runs this."""
    return Machine(
        system=platform.platform(),
        processor=_processor(),
        cores=usable_cores(),
        ram_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        cards=_cards(),
    )


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask where the system has one."""
    try:
        return len(psutil.Process().cpu_affinity() or ()) or os.cpu_count() or 1
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def choose_device(text: str) -> torch.device:
    """The device meant by `--device auto|cpu|cuda|cuda:N`; raises LowmemError where there is none."""
    num_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return torch.device("cuda:0" if num_cards else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise LowmemError(f"--device {text}: give auto, cpu, cuda or cuda:N.")
    if int(index or 0) >= num_cards:
        seen = (
            f"torch sees {num_cards} CUDA card{'s' if num_cards > 1 else ''}"
            if num_cards
            else "torch sees no CUDA card"
        )
        raise LowmemError(f"--device {text}: {seen}. Use --device {'cuda:0' if num_cards else 'cpu'}, or auto.")
    return torch.device("cuda", int(index or 0))


def describe(machine: Machine) -> str:
    """One line for people."""
    cards = ", ".join(f"{card.name} ({format_size(card.total_bytes)})" for card in machine.cards) or "no CUDA card"
    return f"{machine.processor}, {machine.cores} cores, {format_size(machine.ram_bytes)} RAM, {cards}"


def _cards() -> tuple[Card, ...]:
    if not torch.cuda.is_available():
        return ()
    driver = _driver()
    cards = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        cards.append(
            Card(
                index=index,
                name=facts.name,
                total_bytes=facts.total_memory,
                capability=(facts.major, facts.minor),
                driver=driver,
            )
        )
    return tuple(cards)


def _driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
        return found if isinstance(found, str) else found.decode()
    except pynvml.NVMLError:
        return None


def _processor() -> str:
    """The processor's name: from /proc on Linux, else as Python has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
