"""Byte counts as people write them: "8G" <-> 8589934592. Units are binary (1G = 1024**3 bytes)."""

import re

from lowmem.errors import LowmemError

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
UNIT_BYTES = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by "8G", "7.5GiB", "512M" or "1048576"; raises LowmemError on anything else."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise LowmemError(f"{text!r} is not a size. Write a number and a unit, as in 8G, 7.5G or 512M.")
    number, unit = match.groups()
    num_bytes = round(float(number) * UNIT_BYTES[unit.upper()])
    if num_bytes <= 0:
        raise LowmemError(f"{text!r} is no memory at all. Give a size above zero, as in 8G.")
    return num_bytes


def format_size(num_bytes: float) -> str:
    """The shortest of "512 B", "3.2 KiB", "96 MiB", "7.50 GiB" that keeps three significant figures."""
    if num_bytes < 0:
        return "-" + format_size(-num_bytes)
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= scale:
            value = num_bytes / scale
            decimals = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{decimals}f} {unit}"
    return f"{num_bytes:.0f} B"


def short_size(num_bytes: float) -> str:
    """The size as one types it: "8G", "3.5G", "512M"."""
    unit, scale = ("G", GIB) if num_bytes >= GIB else ("M", MIB)
    return f"{round(num_bytes / scale, 2):g}{unit}"
