"""The facts that a diagnosis rests on, read from this computer. What the system does not tell is None."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from PIL import features
from pydantic import BaseModel, ConfigDict

from lowmem.machine import Machine, this_machine
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.nvml import driver_cards

CGROUP = Path("/sys/fs/cgroup")
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
WATCHED = (
    *ALLOCATOR_NAMES, "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD",
)  # fmt: skip
"""Environment variables that change how fast or how lean training is."""


class DriverCard(BaseModel):
    """A card as the driver sees it, whether torch does or not."""

    model_config = ConfigDict(frozen=True)

    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    display_model: str | None = None
    """Windows: WDDM or TCC."""


class Facts(BaseModel):
    """All that the diagnoses look at."""

    model_config = ConfigDict(frozen=True)

    machine: Machine
    windows: bool
    wsl: bool
    torch_version: str
    torch_cuda: str | None
    """The CUDA version that torch was built for; None for a build without CUDA."""
    torch_architectures: tuple[str, ...]
    """Architectures that torch's kernels were compiled for, such as sm_86."""
    driver_cards: tuple[DriverCard, ...]
    environment: dict[str, str]
    """The watched variables that were set when lowmem was started."""
    allocator_settings: str
    """What lowmem trains with: the user's settings or its own."""
    torch_threads: int
    logical_cores: int
    quota_cores: float | None
    """Processor time that a container's limit allows, in cores."""
    busy_frac: float
    """Share of the cores that others keep busy (load average of the last minute)."""
    ram_available_bytes: int
    ram_limit_bytes: int | None
    """A container's limit."""
    shm_bytes: int | None
    disk_free_bytes: int
    disk_path: str
    jpeg_turbo: str | None
    """libjpeg-turbo's version in Pillow; None where Pillow has another library."""
    bf16_in_hardware: bool
    """Whether the processor multiplies in bf16."""


def gather_facts(folder: Path = Path(), environment: Mapping[str, str] | None = None) -> Facts:
    """Read everything; `folder` is where runs would go."""
    machine = this_machine()
    environment = os.environ if environment is None else environment
    given = {name: environment[name] for name in WATCHED if name in environment}
    prepare_allocator()
    disk = shutil.disk_usage(folder)
    memory = psutil.virtual_memory()
    return Facts(
        machine=machine,
        windows=sys.platform == "win32",
        wsl="microsoft" in platform.release().lower(),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_architectures=tuple(torch.cuda.get_arch_list()),
        driver_cards=tuple(DriverCard(**card) for card in driver_cards()),
        environment=given,
        allocator_settings=next((os.environ[name] for name in ALLOCATOR_NAMES if os.environ.get(name)), ""),
        torch_threads=torch.get_num_threads(),
        logical_cores=os.cpu_count() or 1,
        quota_cores=quota_cores(),
        busy_frac=psutil.getloadavg()[0] / (os.cpu_count() or 1),
        ram_available_bytes=memory.available,
        ram_limit_bytes=memory_limit_bytes(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        disk_free_bytes=disk.free,
        disk_path=str(folder.resolve()),
        jpeg_turbo=features.version_feature("libjpeg_turbo") if features.check_feature("libjpeg_turbo") else None,
        bf16_in_hardware=_bf16_in_hardware(),
    )


def quota_cores(root: Path = CGROUP) -> float | None:
    """Cores that a container may use: cgroup 2's `cpu.max`, or cgroup 1's quota; None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def memory_limit_bytes(root: Path = CGROUP) -> int | None:
    """Bytes that a container may use; None without a limit (cgroup 1 writes a number near 2**63 for that)."""
    for path in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 2**60 else None
    return None


def _bf16_in_hardware() -> bool:
    """AVX-512 BF16 or AMX, as Linux names them; elsewhere it is not known and taken as absent."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
