"""The findings, printed."""

import json
import textwrap
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lowmem.doctor.diagnoses import Finding, diagnose
from lowmem.doctor.facts import gather_facts

COLOURS = {"ok": "green", "could be better": "yellow", "problem": "red"}
EXIT_PROBLEM = 1


def run_doctor(folder: Path, as_json: bool, console: Console) -> int:
    """Print every finding, as text or as JSON with the facts; returns the exit code: 1 where there is a problem."""
    facts = gather_facts(folder)
    findings = diagnose(facts)
    if as_json:
        print(json.dumps({"findings": [each._asdict() for each in findings], "facts": facts.model_dump()}, indent=1))
    else:
        _print(findings, console)
    return EXIT_PROBLEM if any(each.verdict == "problem" for each in findings) else 0


def _print(findings: list[Finding], console: Console) -> None:
    verdict_width = max(len(verdict) for verdict in COLOURS)
    topic_width = max(len(each.topic) for each in findings)
    indent = " " * (verdict_width + topic_width + 4)
    for each in findings:
        width = console.width - len(indent)
        lines = _wrapped(each.what, width) + [
            line for text in each.fix.splitlines() for line in _fix_lines(text, width)
        ]
        verdict = f"[{COLOURS[each.verdict]}]{each.verdict:<{verdict_width}}[/]"
        console.print(f"{verdict}  {each.topic:<{topic_width}}  {escape(lines[0])}", highlight=False, soft_wrap=True)
        for line in lines[1:]:
            console.print(f"{indent}{escape(line)}", highlight=False, soft_wrap=True)
    counts = {verdict: sum(each.verdict == verdict for each in findings) for verdict in COLOURS}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), highlight=False)


def _fix_lines(text: str, width: int) -> list[str]:
    first, *rest = _wrapped(text, width - 3)
    return [f"-> {first}", *(f"   {line}" for line in rest)]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(30, width), break_long_words=False, break_on_hyphens=False) or [""]
