"""A question about a recipe, asked over several seeds: each arm is trained on the same seeds, and compared seed by seed.

    python tools/ablate.py configs/questions/cardinality.toml --data photos/ --vram 8G --seeds 5
    python tools/ablate.py demo/cardinality --seeds 5 --results benchmarks/results/

A question is a TOML file: `question`, `base` (a recipe's name, or a file beside it), `set` (changes of all arms, as for --set), and
either `field` with its `values`, or `[[arms]]`, each with a `name` and the fields it sets. The first arm is the one that the others are
compared with. Every run is one `lowmem train` in a process of its own; a run that was stopped is resumed, a finished one is kept, so the
same command goes on where it was cut off. The score is that of the classifier which the run kept, on its validation images, on which the
best epoch was chosen too: all arms profit from that alike.
"""

import argparse
import json
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paired import Arm, compared, draw, print_comparison
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from summarize import status

from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.recipe import Recipe, load_recipe
from lowmem.training.evaluate import read_evaluation

QUESTIONS = Path(__file__).resolve().parent.parent / "configs" / "questions"
METRICS = ("accuracy", "f1", "precision", "recall", "loss")


class ArmFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, pattern=r"^[^/\\:]+$")
    set: tuple[str, ...] = ()


class Question(BaseModel):
    """A question as its file has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    base: str
    set: tuple[str, ...] = ()
    field: str | None = None
    values: tuple[Any, ...] = ()
    arms: tuple[ArmFile, ...] = ()

    @model_validator(mode="after")
    def _has_arms_of_one_kind(self) -> "Question":
        if bool(self.field and self.values) == bool(self.arms) or (self.field is None) != (not self.values):
            raise ValueError("give either field and values, or [[arms]]")
        names = [arm.name for arm in self.all_arms()]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError("a comparison needs at least two arms of different names")
        return self

    def all_arms(self) -> tuple[ArmFile, ...]:
        if self.arms:
            return self.arms
        return tuple(ArmFile(name=str(value), set=(f"{self.field}={json.dumps(value)}",)) for value in self.values)


@dataclass(frozen=True)
class Trial:
    """One run: an arm under a seed, in its folder."""

    arm: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("question", help="a TOML file, or a name under configs/questions/")
    options.add_argument("--data", type=Path, help="as for lowmem train; default: the embedded images")
    options.add_argument("--vram", default="8G")
    options.add_argument("--device", default="auto")
    options.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1; two at least for an interval")
    options.add_argument("--metric", choices=METRICS, default="accuracy")
    options.add_argument("--out", type=Path, help="folder of the runs; default: runs/ablations/QUESTION")
    options.add_argument("--results", type=Path, help="folder for the table and the figure; default: the runs' folder")
    chosen = options.parse_args()
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        ask(chosen, console)
    except LowmemError as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on from here.")
        return 130
    return 0


def ask(chosen: argparse.Namespace, console: Console) -> None:
    """Train what is missing, and tell how the arms compare."""
    if chosen.seeds < 1:
        raise LowmemError(f"--seeds {chosen.seeds}: give at least 1, and 2 or more for an interval.")
    path = question_file(chosen.question)
    question = read_question(path)
    name = path.stem if path.parent.name != "demo" else f"demo-{path.stem}"
    out = chosen.out or Path("runs/ablations") / name
    base = base_recipe(path, question.base)
    todo = trials(question, base, chosen.seeds, out)
    for number, trial in enumerate(todo, start=1):
        console.print(f"[bold]{number} of {len(todo)}:[/] {trial.arm}, seed {trial.seed}")
        run(trial, base, chosen)
    arms = [
        Arm(arm.name, tuple(score(trial.folder, chosen.metric) for trial in todo if trial.arm == arm.name))
        for arm in question.all_arms()
    ]
    results = chosen.results or out
    results.mkdir(parents=True, exist_ok=True)
    report = report_of(question, base, arms, chosen) | {"command": command_of(chosen)}
    (results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(question.question, chosen.metric, arms, results / f"{name}.png")
    print_comparison(question.question, chosen.metric, arms, console)
    console.print(f"Written: {results / name}.json, .png")


def question_file(text: str) -> Path:
    """A file, or a question that ships with lowmem."""
    for path in (Path(text), QUESTIONS / f"{text}.toml"):
        if path.is_file():
            return path
    names = sorted(p.relative_to(QUESTIONS).with_suffix("").as_posix() for p in QUESTIONS.rglob("*.toml"))
    shipped = ", ".join(name for name in names if name != "demo/small")
    raise LowmemError(f"There is no question {text}: give a TOML file, or one of {shipped}.")


def read_question(path: Path) -> Question:
    try:
        return Question.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LowmemError(f"{path}: not a TOML file: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise LowmemError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from None


def base_recipe(question: Path, base: str) -> str:
    """The recipe's name, or the file beside the question."""
    beside = question.parent / base
    return str(beside) if beside.suffix == ".toml" and beside.is_file() else base


def trials(question: Question, base: str, seeds: int, out: Path) -> list[Trial]:
    """Seed by seed, so that a stopped comparison has whole pairs. Every recipe is checked before the first run."""
    found = []
    for seed in range(seeds):
        for arm in question.all_arms():
            overrides = (*question.set, *arm.set, f"seed={seed}")
            load_recipe(base, overrides)
            found.append(Trial(arm.name, seed, overrides, out / f"{arm.name.replace(' ', '-')}-seed{seed}"))
    return found


def run(trial: Trial, base: str, chosen: argparse.Namespace) -> None:
    """Train a trial to its end, from where it stands; raises LowmemError where it fails or is another recipe's."""
    if (trial.folder / "recipe.toml").is_file():
        refuse_another_recipe(trial, base)
        if status(trial.folder) == "finished":
            return
        arguments = ["resume", str(trial.folder)]
    else:
        sets = [part for override in trial.overrides for part in ("--set", override)]
        data = [] if chosen.data is None else ["--data", str(chosen.data)]
        arguments = ["train", "--recipe", base, "--vram", chosen.vram, "--device", chosen.device, *data, *sets]
        arguments += ["--out", str(trial.folder)]
    code = exit_code([sys.executable, "-m", "lowmem", *arguments])
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise LowmemError(f"{trial.arm}, seed {trial.seed} failed with exit code {code}: lowmem {' '.join(arguments)}")


def exit_code(command: list[str]) -> int:
    """Of the command, which is waited for where the user stops both: it saves its step first."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal sent it to both
        process.wait()
        raise
    except TerminatedError:
        process.terminate()
        process.wait()
        raise KeyboardInterrupt from None


class TerminatedError(Exception):
    """SIGTERM, which comes to this process alone."""


def _terminated(*_: object) -> None:
    raise TerminatedError


def refuse_another_recipe(trial: Trial, base: str) -> None:
    kept, asked = load_recipe(str(trial.folder / "recipe.toml")), load_recipe(base, trial.overrides)
    if _settled(kept, kept) != _settled(asked, kept):
        raise LowmemError(
            f"{trial.folder} was trained with another recipe than the question asks for now. Give another --out."
        )


def _settled(recipe: Recipe, kept: Recipe) -> Recipe:
    """With the arithmetic that the device has settled."""
    return recipe.model_copy(update={"amp": kept.amp}) if recipe.amp == "auto" else recipe


def score(folder: Path, metric: str) -> float:
    return float(getattr(read_evaluation(folder / "evaluation.json"), metric))


def report_of(question: Question, base: str, arms: list[Arm], chosen: argparse.Namespace) -> dict[str, Any]:
    """All that the comparison rests on."""
    folders = {arm.name: arm.set for arm in question.all_arms()}
    return {
        "question": question.question,
        "metric": f"validation {chosen.metric} of the best epoch",
        "data": str(chosen.data) if chosen.data else "the embedded images (clip art)",
        "base": Path(base).stem,
        "set": question.set,
        "machine": this_machine().model_dump(),
        "n": chosen.seeds,
        "arms": [{"name": arm.name, "set": folders[arm.name], "scores": arm.scores, **arm.summary()} for arm in arms],
        "comparisons": [vars(item) for item in compared(arms)],
    }


def command_of(chosen: argparse.Namespace) -> str:
    data = f" --data {chosen.data}" if chosen.data else ""
    return f"python tools/ablate.py {chosen.question}{data} --vram {chosen.vram} --seeds {chosen.seeds} --metric {chosen.metric}"


if __name__ == "__main__":
    sys.exit(main())
