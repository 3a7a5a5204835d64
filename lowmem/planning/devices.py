"""Devices known by name, and the device that is here."""

import difflib
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from lowmem.errors import LowmemError
from lowmem.sizes import GIB, MIB

TABLE = Path(__file__).parent / "devices.toml"
AmpDtype = Literal["bf16", "fp16", "fp32"]


class DeviceSpec(BaseModel):
    """What a plan needs to know of a device. Rates per second: bytes, and operations with a multiply-add counted as two."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["cpu", "cuda"] = "cuda"
    memory_gib: float
    bandwidth: float
    flops: dict[str, float]
    host_link: float
    supports_bf16: bool
    context_mib: float
    source: str
    match: tuple[str, ...] = ()
    present: bool = False
    """Whether the device is in this computer."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def context_bytes(self) -> int:
        return int(self.context_mib * MIB)


@lru_cache
def known_devices() -> tuple[DeviceSpec, ...]:
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))["device"]
    return tuple(DeviceSpec.model_validate(entry) for entry in entries)


def device_by_name(text: str) -> DeviceSpec:
    """The device that a person or a driver means; raises LowmemError listing the known ones."""
    wanted = " ".join(
        text.lower().replace("nvidia", "").replace("geforce", "").replace("tesla", "").replace("gpu", "").split()
    )
    exact = [spec for spec in known_devices() if spec.name.lower() == text.lower().strip()]
    found = exact or sorted(
        (spec for spec in known_devices() if any(word in wanted for word in spec.match)),
        key=lambda spec: -max(len(word) for word in spec.match if word in wanted),
    )
    if found:
        return found[0]
    names = [spec.name for spec in known_devices()]
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise LowmemError(f"--device {text!r} is not a device that lowmem knows.{hint} Known: {', '.join(names)}.")


def device_spec(device: torch.device) -> DeviceSpec:
    """The facts of a device in this computer: its memory as it is, its rates from the table where it is known."""
    if device.type == "cpu":
        cpu = device_by_name("cpu")
        return cpu.model_copy(update={"present": True, "memory_gib": psutil.virtual_memory().total / GIB})
    facts = torch.cuda.get_device_properties(device)
    here = {
        "name": facts.name,
        "memory_gib": facts.total_memory / GIB,
        "supports_bf16": facts.major >= 8,
        "present": True,
    }
    try:
        return device_by_name(facts.name).model_copy(update=here)
    except LowmemError:
        return _generic_card(facts).model_copy(update=here)


def settle_amp(amp: str, spec: DeviceSpec) -> AmpDtype:
    """The recipe's arithmetic with `auto` settled: bf16 on cards that compute in it, fp16 on older cards, fp32 on a CPU."""
    if amp == "auto":
        amp = "fp32" if spec.kind == "cpu" else "bf16" if spec.supports_bf16 else "fp16"
    if amp == "bf16" and not spec.supports_bf16:
        raise LowmemError(f"amp=bf16: {spec.name} does not compute in bf16. Use amp=fp16 or amp=auto.")
    return amp  # type: ignore[return-value]


def _generic_card(facts: object) -> DeviceSpec:
    """A card that is not in the table: rates of a middling one, scaled by its multiprocessors."""
    middle = device_by_name("RTX 3060")
    scale = facts.multi_processor_count / 28  # type: ignore[attr-defined]
    return middle.model_copy(
        update={
            "bandwidth": middle.bandwidth * scale,
            "flops": {name: rate * scale for name, rate in middle.flops.items()},
            "source": "not in the table: an RTX 3060 scaled by the number of multiprocessors",
        }
    )
