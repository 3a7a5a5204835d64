"""What NVML, the driver's own library, tells of a card: memory as the driver sees it, and energy."""

import os

import torch


def open_card(device: torch.device) -> object | None:
    """NVML's handle of a CUDA device of torch; None on other devices, and where NVML does not know it."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError):
        return None


def card_bytes(card: object | None) -> tuple[int | None, int | None, int | None]:
    """(total, free, own) of a card as its driver sees it; `own` is None where it does not tell (Windows' display driver model)."""
    if card is None:
        return None, None, None
    import pynvml

    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(card)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    except pynvml.NVMLError:
        return None, None, None
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return int(memory.total), int(memory.free), int(own[0]) if own and own[0] is not None else None


def card_joules(card: object | None) -> float | None:
    """Energy that a card has used since its driver was loaded (Volta and later); None where nothing counts it."""
    if card is None:
        return None
    import pynvml

    try:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000
    except pynvml.NVMLError:
        return None


def driver_cards() -> list[dict[str, object]]:
    """Every card that the driver has: name, driver, total_bytes, free_bytes, display_model. Empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    return [_driver_card(handle, driver) for handle in handles]


def _driver_card(handle: object, driver: str) -> dict[str, object]:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    facts: dict[str, object] = {"name": _text(pynvml.nvmlDeviceGetName(handle)), "driver": driver}
    facts |= {"total_bytes": int(memory.total), "free_bytes": int(memory.free), "display_model": None}
    try:  # only Windows has display driver models
        current, _ = pynvml.nvmlDeviceGetDriverModel(handle)
        facts["display_model"] = "WDDM" if current == pynvml.NVML_DRIVER_WDDM else "TCC"
    except pynvml.NVMLError:
        pass
    return facts


def _text(found: str | bytes) -> str:
    return found if isinstance(found, str) else found.decode()
