"""How a result was measured: the section of a page that names the machine, the versions and the counts."""

from collections.abc import Iterable, Mapping
from typing import Any

from lowmem.results.page import Lines, Section
from lowmem.sizes import format_size


def measured_section(machine: Mapping[str, Any] | None, counts: Iterable[str] = ()) -> Section:
    """`machine`: a Machine as a dictionary (`machine.json`); `counts`: sentences on what was repeated how often, and the command."""
    lines = [*counts, *(machine_lines(machine) if machine else ())]
    return Section("How it was measured", Lines(lines)) if lines else Section("How it was measured")


def machine_lines(facts: Mapping[str, Any]) -> list[str]:
    """Processor, system, cards and versions, a line each."""
    cards = [_card_line(card) for card in facts["cards"]]
    return [
        f"{facts['processor']}, {facts['cores']} cores, {format_size(facts['ram_bytes'])} RAM",
        *(cards or ["no CUDA card"]),
        f"{facts['system']}, Python {facts['python']}",
        ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
    ]


def _card_line(card: Mapping[str, Any]) -> str:
    driver = f", driver {card['driver']}" if card.get("driver") else ""
    return f"{card['name']}, {format_size(card['total_bytes'])}{driver}"
