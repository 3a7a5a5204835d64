"""The figures in the headers of configs/: predicted peak and time of an epoch on two cards, as `lowmem plan` says.

    python tools/describe_configs.py            # write them again
    python tools/describe_configs.py --check    # say which are more than 3 % stale

Each figure is the plan of `lowmem plan --recipe NAME --device DEVICE --vram VRAM` for 100 classes and 20,700 images.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lowmem.budgeting import ASSUMED_CLASSES, ASSUMED_IMAGES
from lowmem.planning.devices import device_by_name
from lowmem.planning.plan import Prediction
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, load_recipe, recipe_from_tree, recipe_names
from lowmem.sizes import GIB, parse_size

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CARDS = (("RTX 4060 laptop", "8G"), ("Tesla T4", "15G"))
UNDESCRIBED = ("quickstart",)
"""Recipes whose point is not an epoch of photographs on a card."""
TOLERANCE = 0.03
ROUNDING = {"GiB": 0.005, "seconds": 0.5}
TITLE = f"# Predicted for {ASSUMED_IMAGES:,} images, {ASSUMED_CLASSES} classes (lowmem plan; training only, from a roofline of the data sheet):"
LINE = re.compile(r"#   (?P<card>[^,]+), (?P<vram>\S+): peak (?P<peak>[\d.]+) GiB, (?P<seconds>\d+) s an epoch.*")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a figure is stale")
    options.add_argument("names", nargs="*", help="recipes; default: all that ship")
    chosen = options.parse_args()
    names = chosen.names or [name for name in recipe_names() if name not in UNDESCRIBED]
    if chosen.check:
        stale = [text for name in names for text in stale_figures(name)]
        print("\n".join(stale) or f"The figures of {len(names)} recipes are those of lowmem plan.")
        return 1 if stale else 0
    for name in names:
        path = CONFIGS / f"{name}.toml"
        path.write_text(with_figures(path.read_text(encoding="utf-8"), figures(name)), encoding="utf-8", newline="\n")
        print("\n".join([name, *figures(name)]))
    return 0


def figures(name: str) -> list[str]:
    """The lines of a recipe's header, one for each card."""
    return [_line(card, vram, predicted(name, card, vram)) for card, vram in CARDS]


def with_figures(text: str, lines: Iterable[str]) -> str:
    """A recipe's file with these lines in its header, before the command, instead of those that it had."""
    kept = [line for line in text.splitlines() if not line.startswith("# Predicted for") and not LINE.fullmatch(line)]
    command = next(index for index, line in enumerate(kept) if line.startswith("#   lowmem train"))
    return "\n".join([*kept[:command], TITLE, *lines, *kept[command:]]) + "\n"


def stale_figures(name: str) -> list[str]:
    """What a recipe's header says that the planner no longer does."""
    written = [match for line in _header(name) if (match := LINE.fullmatch(line))]
    if [(match["card"], match["vram"]) for match in written] != list(CARDS):
        return [f"{name}: the header has no figures for {' and '.join(card for card, _ in CARDS)}"]
    told = []
    for match in written:
        found = predicted(name, match["card"], match["vram"])
        for what, old, new in (
            ("GiB", float(match["peak"]), found.peak.total / GIB),
            ("seconds", float(match["seconds"]), found.epoch_s),
        ):
            if abs(old - new) > TOLERANCE * new + ROUNDING[what]:
                told.append(f"{name} on {match['card']}: {what} {old:g} in the header, {new:.3g} planned")
    return told


def predicted(name: str, card: str, vram: str) -> Prediction:
    return _predicted(_costing(load_recipe(name)).to_toml(), card, vram)


@cache
def _predicted(recipe_toml: str, card: str, vram: str) -> Prediction:
    recipe, spec = recipe_from_tree(tomllib.loads(recipe_toml), "configs"), device_by_name(card)
    sizes = {"num_classes": ASSUMED_CLASSES, "num_train": ASSUMED_IMAGES}
    prediction = make_plan(recipe, spec, "cuda:0", parse_size(vram), **sizes).prediction
    assert prediction is not None
    return prediction


def _costing(recipe: Recipe) -> Recipe:
    """The recipe without what costs nothing on the card, so that versions of a recipe share their plans."""
    plain = Recipe(model=recipe.model)
    return recipe.model_copy(
        update={"schedule": plain.schedule, "augment": plain.augment, "loss": plain.loss, "optimizer": plain.optimizer}
    )


def _line(card: str, vram: str, prediction: Prediction) -> str:
    overhead = prediction.step_s / prediction.baseline_step_s - 1
    cost = f", {overhead:+.1%} over the unconstrained step" if overhead > 5e-4 else ""
    return f"#   {card}, {vram}: peak {prediction.peak.total / GIB:.2f} GiB, {prediction.epoch_s:.0f} s an epoch{cost}"


def _header(name: str) -> list[str]:
    return (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    sys.exit(main())
