"""From facts to findings: each diagnosis is a pure function of what was read, and says what to type where something can be better."""

from typing import Literal, NamedTuple

from lowmem.doctor.facts import DriverCard, Facts
from lowmem.sizes import GIB, MIB, format_size

Verdict = Literal["ok", "could be better", "problem"]
FIRST_SPILLING_DRIVER, FIRST_DRIVER_WITH_SWITCH = (536, 40), (546, 1)
"""Windows drivers spill to host memory since 536.40 and let one switch it off since 546.01 (NVIDIA's support article 5490)."""
LEAST_TORCH = (2, 11)
LEAST_DISK_BYTES, GOOD_DISK_BYTES = 1 * GIB, 5 * GIB
"""A run of a network of 100 million weights keeps two checkpoints of 1.1 GB and a classifier of 0.4 GB."""
LEAST_RAM_BYTES, GOOD_RAM_BYTES = 1 * GIB, 4 * GIB
LEAST_SHM_BYTES = 128 * MIB
"""Loader processes hold a few batches of pixels there: a batch of 128 at 320 px is 39 MB."""
HELD_FRAC = 0.15
"""A card's memory in the hands of others beyond this share narrows budgets."""
BUSY_FRAC = 0.5


class Finding(NamedTuple):
    """One line of the doctor's: `fix` says what to do or type, where there is something."""

    topic: str
    verdict: Verdict
    what: str
    fix: str = ""


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding, in the order in which they are shown."""
    findings = [torch_build(facts), cards(facts)]
    if facts.machine.cards:
        findings += [arithmetic(facts), architectures(facts), held_memory(facts), allocator(facts), spilling(facts)]
        findings += [launch_blocking(facts)]
    else:
        findings.append(arithmetic(facts))
    findings += [cores(facts), threads(facts), waiting_threads(facts), load(facts), ram(facts), shared_memory(facts)]
    return [*findings, disk(facts), pillow(facts)]


def torch_build(facts: Facts) -> Finding:
    what = (
        f"torch {facts.torch_version}, built for {'CUDA ' + facts.torch_cuda if facts.torch_cuda else 'the CPU only'}"
    )
    numbers = tuple(int(part) for part in facts.torch_version.split("+")[0].split(".")[:2])
    if numbers < LEAST_TORCH:
        return Finding(
            "torch", "problem", f"{what}; lowmem needs 2.11 or later", "pip install --upgrade torch torchvision"
        )
    return Finding("torch", "ok", what)


def cards(facts: Facts) -> Finding:
    """Whether torch sees the cards that the driver has."""
    if facts.machine.cards:
        names = ", ".join(f"{card.name} ({format_size(card.total_bytes)})" for card in facts.machine.cards)
        return Finding("GPU", "ok", f"{names}, driver {facts.machine.cards[0].driver or 'unknown'}; torch sees it")
    if not facts.driver_cards:
        fix = "with an NVIDIA card in this computer: install its driver, then type nvidia-smi"
        return Finding("GPU", "could be better", "no NVIDIA card or no driver: training runs on the CPU", fix)
    card = facts.driver_cards[0]
    seen = f"the driver ({card.driver}) has {card.name}, but torch does not see it"
    if not facts.torch_cuda:
        fix = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cu130"
        return Finding("GPU", "problem", f"{seen}: this build of torch is for the CPU only", fix)
    hidden = facts.environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(
            "GPU", "problem", f"{seen}: CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset CUDA_VISIBLE_DEVICES"
        )
    fix = f"update the driver to one for CUDA {facts.torch_cuda}: https://www.nvidia.com/drivers"
    return Finding("GPU", "problem", f"{seen}: the driver may be too old for CUDA {facts.torch_cuda}", fix)


def arithmetic(facts: Facts) -> Finding:
    """The dtype that `amp = "auto"` becomes."""
    if not facts.machine.cards:
        if facts.bf16_in_hardware:
            return Finding(
                "arithmetic", "could be better", "fp32 on this CPU, which also multiplies in bf16", "--set amp=bf16"
            )
        return Finding("arithmetic", "ok", "fp32 on this CPU")
    old = [card for card in facts.machine.cards if card.capability[0] < 8]
    if not old:
        return Finding("arithmetic", "ok", "bf16: as fast as fp16, and needs no loss scaling")
    if old[0].capability[0] < 7:
        what = f"fp16 on {old[0].name}, which has no tensor cores: it saves memory, not time"
        return Finding("arithmetic", "could be better", what, "a card of the RTX or T4 generation or later")
    return Finding("arithmetic", "ok", f"fp16 with loss scaling: {old[0].name} does not compute in bf16")


def architectures(facts: Facts) -> Finding:
    """Whether torch has kernels for the card, or code that the driver can compile for it."""
    for card in facts.machine.cards:
        if facts.torch_architectures and not any(_serves(name, card.capability) for name in facts.torch_architectures):
            major, minor = card.capability
            what = (
                f"torch has no kernels for {card.name} (sm_{major}{minor}), only {', '.join(facts.torch_architectures)}"
            )
            fix = "choose a build for another CUDA version: https://pytorch.org/get-started/locally"
            return Finding("kernels", "problem", what, fix)
    return Finding("kernels", "ok", "torch has kernels for this card")


def held_memory(facts: Facts) -> Finding:
    for card in facts.driver_cards:
        held = card.total_bytes - card.free_bytes
        if held > HELD_FRAC * card.total_bytes:
            what = f"others hold {format_size(held)} of {card.name}; {format_size(card.free_bytes)} are free"
            return Finding(
                "free memory",
                "could be better",
                what,
                "close what nvidia-smi lists, or give --vram no more than is free",
            )
    free = ", ".join(format_size(card.free_bytes) for card in facts.driver_cards) or "not told by the driver"
    return Finding("free memory", "ok", f"on the card: {free}")


def allocator(facts: Facts) -> Finding:
    """Expandable segments fragment less; torch does not have them on Windows."""
    settings = facts.allocator_settings.replace(" ", "")
    given = [name for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in facts.environment]
    if "backend:cudaMallocAsync" in settings:
        what = f"{given[0]}={settings}: this allocator cannot be held to a budget" if given else settings
        return Finding("allocator", "problem", what, f"unset {' '.join(given)}")
    if facts.windows:
        if "expandable_segments:True" in settings:
            what = "expandable segments are asked for, which torch does not have on Windows"
            return Finding("allocator", "could be better", what, "\n".join(f"set {name}=" for name in given))
        return Finding("allocator", "ok", "torch's own settings; it has no expandable segments on Windows")
    if "expandable_segments:True" not in settings:
        what = f"{' '.join(given)} leaves out expandable segments, so more memory is lost to fragments"
        return Finding("allocator", "could be better", what, f"unset {' '.join(given)}, and lowmem switches them on")
    return Finding("allocator", "ok", f"{facts.allocator_settings}{' (yours)' if given else ' (set by lowmem)'}")


def spilling(facts: Facts) -> Finding:
    """Windows' driver moves memory to the host when a card is full, which makes steps many times slower."""
    if not (facts.windows or facts.wsl):
        return Finding("spilling", "ok", "on Linux a full card is an error, never a spill to host memory")
    card = facts.driver_cards[0] if facts.driver_cards else None
    if card is None or card.display_model == "TCC":
        return Finding("spilling", "ok", "this driver model does not spill to host memory")
    where = (
        "lowmem limits its own allocator below the card's size, which prevents it unless other programs fill the card"
    )
    version = _version(card)
    if version < FIRST_SPILLING_DRIVER:
        return Finding("spilling", "ok", f"driver {card.driver} does not spill to host memory")
    if version < FIRST_DRIVER_WITH_SWITCH:
        what = f"driver {card.driver} spills to host memory when the card is full, and has no switch for it; {where}"
        return Finding("spilling", "could be better", what, "update the driver: https://www.nvidia.com/drivers")
    if facts.wsl:
        what = f"under WSL the driver's policy is not kept; {where}"
        return Finding("spilling", "could be better", what, "give --vram 1G less than is free on the card")
    fix = "NVIDIA Control Panel > Manage 3D settings > CUDA - Sysmem Fallback Policy > Prefer No Sysmem Fallback"
    what = f"driver {card.driver} may spill to host memory (no program can read its setting); {where}"
    return Finding("spilling", "could be better", what, fix)


def launch_blocking(facts: Facts) -> Finding:
    if facts.environment.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        what = "CUDA_LAUNCH_BLOCKING makes every kernel wait for the one before"
        return Finding("launches", "could be better", what, "unset CUDA_LAUNCH_BLOCKING")
    return Finding("launches", "ok", "kernels are queued, not waited for")


def cores(facts: Facts) -> Finding:
    usable, quota = facts.machine.cores, facts.quota_cores
    what = f"{usable} of {facts.logical_cores} logical cores may be used"
    if quota is not None and quota < usable - 0.01:
        what = f"a container's limit allows {quota:g} cores, but {usable} are visible: threads beyond the limit get stopped"
        fix = (
            f"OMP_NUM_THREADS={max(1, int(quota))}, and pin the container (docker run --cpuset-cpus) instead of --cpus"
        )
        return Finding("cores", "could be better", what, fix)
    if usable < 2:
        return Finding(
            "cores", "could be better", f"{what}: decoding and training share it", "give this process more cores"
        )
    if usable < facts.logical_cores / 2:
        return Finding(
            "cores", "could be better", f"{what} (affinity mask)", "start without taskset or numactl, or widen it"
        )
    return Finding("cores", "ok", what)


def threads(facts: Facts) -> Finding:
    what = f"torch uses {facts.torch_threads} thread{'s' if facts.torch_threads > 1 else ''} outside of training"
    allowed = min(facts.machine.cores, facts.quota_cores or facts.machine.cores)
    given = [
        f"{name}={facts.environment[name]}"
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        if name in facts.environment
    ]
    if facts.torch_threads > max(1, allowed):
        fix = f"OMP_NUM_THREADS={max(1, int(allowed))}"
        return Finding("threads", "could be better", f"{what}, more than the {allowed:g} cores", fix)
    if given and facts.torch_threads < allowed and not facts.machine.cards:
        names = " ".join(item.partition("=")[0] for item in given)
        return Finding("threads", "could be better", f"{what}: {', '.join(given)}", f"unset {names}")
    return Finding("threads", "ok", f"{what}; a plan shares the cores out between torch and the loader")


def waiting_threads(facts: Facts) -> Finding:
    """OpenMP threads that spin while they wait take the cores from the loader (measured on two cores: steps ten times slower and more)."""
    policy, block = facts.environment.get("OMP_WAIT_POLICY", "PASSIVE"), facts.environment.get("KMP_BLOCKTIME", "0")
    if policy.upper() == "ACTIVE" or block not in ("0", "0ms"):
        what = f"OMP_WAIT_POLICY={policy}, KMP_BLOCKTIME={block}: waiting threads spin and take cores from the loader"
        return Finding("OpenMP", "could be better", what, "unset OMP_WAIT_POLICY KMP_BLOCKTIME, and lowmem sets them")
    pinned = [name for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY") if name in facts.environment]
    if pinned:
        what = f"{' and '.join(pinned)} pins torch's threads to cores that loader workers use too"
        return Finding("OpenMP", "could be better", what, f"unset {' '.join(pinned)}")
    return Finding("OpenMP", "ok", "waiting threads sleep")


def load(facts: Facts) -> Finding:
    if facts.busy_frac > BUSY_FRAC:
        what = f"programs kept {facts.busy_frac:.0%} of the cores busy in the last minute"
        return Finding("load", "could be better", what, "close other programs while you train or measure")
    return Finding("load", "ok", f"{facts.busy_frac:.0%} of the cores were busy in the last minute")


def ram(facts: Facts) -> Finding:
    limit = facts.ram_limit_bytes
    available = facts.ram_available_bytes if limit is None else min(limit, facts.ram_available_bytes)
    what = f"{format_size(available)} of {format_size(min(limit or facts.machine.ram_bytes, facts.machine.ram_bytes))} are free"
    if limit is not None and limit < facts.machine.ram_bytes:
        what += " (a container's limit)"
    if available < LEAST_RAM_BYTES:
        return Finding(
            "host memory", "problem", f"{what}: too little to load images beside a model", "close other programs"
        )
    if available < GOOD_RAM_BYTES:
        return Finding(
            "host memory",
            "could be better",
            f"{what}: little room for offloading",
            "close other programs, or give --ram",
        )
    return Finding("host memory", "ok", what)


def shared_memory(facts: Facts) -> Finding:
    if facts.shm_bytes is None:
        return Finding("shared memory", "ok", "the system sets no limit of its own")
    what = f"/dev/shm has {format_size(facts.shm_bytes)}"
    if facts.shm_bytes < LEAST_SHM_BYTES:
        return Finding(
            "shared memory", "could be better", f"{what}: little for loader processes", "docker run --shm-size=2g"
        )
    return Finding("shared memory", "ok", what)


def disk(facts: Facts) -> Finding:
    what = f"{format_size(facts.disk_free_bytes)} free in {facts.disk_path}"
    if facts.disk_free_bytes < LEAST_DISK_BYTES:
        return Finding(
            "disk",
            "problem",
            f"{what}: too little for a run's checkpoints",
            "make room, or train with --out on another disk",
        )
    if facts.disk_free_bytes < GOOD_DISK_BYTES:
        return Finding(
            "disk",
            "could be better",
            what,
            "a large network's run keeps about 3 GB: lowmem train --out on another disk",
        )
    return Finding("disk", "ok", what)


def pillow(facts: Facts) -> Finding:
    """libjpeg-turbo decodes 2 to 6 times as fast as libjpeg (its own documentation)."""
    packages = facts.machine.packages
    simd = packages.get("pillow-simd")
    what = f"pillow-simd {simd}" if simd else f"Pillow {packages.get('pillow', 'unknown')}"
    if facts.jpeg_turbo is None:
        fix = "pip install --force-reinstall pillow (its wheels bring libjpeg-turbo)"
        return Finding("images", "could be better", f"{what} without libjpeg-turbo: JPEGs decode slowly", fix)
    return Finding("images", "ok", f"{what} with libjpeg-turbo {facts.jpeg_turbo}")


def _serves(architecture: str, capability: tuple[int, int]) -> bool:
    """Kernels (sm_86) run on cards of the same major version and no lower minor one, code (compute_86) on all later cards."""
    kind, _, text = architecture.partition("_")
    number, wanted = int(text.rstrip("af")), 10 * capability[0] + capability[1]
    return number <= wanted and (kind == "compute" or number // 10 == capability[0])


def _version(card: DriverCard) -> tuple[int, int]:
    major, _, minor = card.driver.partition(".")
    return int(major or 0), int((minor.partition(".")[0]) or 0)
