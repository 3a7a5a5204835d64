"""Recipes as files: read with what they build on, overridden, and checked.

A recipe is a TOML file. It may build on another one (`base = "name"`), and `--set section.key=value` overrides any
field. A wrong key names the nearest right one.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lowmem.errors import LowmemError
from lowmem.recipe.fields import Recipe

OPTIONAL_KEYS = ("optimizer.clip_norm", "optimizer.layer_decay", "ema.decay", "batch.norm_batch")
"""Keys that `--set KEY=none` takes out."""


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a name in configs/ or a TOML file, with `section.key=value` overrides; raises LowmemError."""
    tree = _read_tree(name_or_path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    return recipe_from_tree(tree, source=name_or_path)


def recipe_from_tree(tree: dict[str, Any], source: str) -> Recipe:
    """A checked recipe from nested tables; raises LowmemError naming the key, the value and what is possible."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise LowmemError(
            "\n".join([f"{source}: not a valid recipe."] + [_explain(item) for item in error.errors()])
        ) from None


def with_overrides(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with `section.key=value` overrides applied; raises LowmemError."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    for override in overrides:
        _apply_override(tree, override)
    return recipe_from_tree(tree, source="--set")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with lowmem."""
    return sorted(path.stem for path in _configs_dir().glob("*.toml"))


def recipe_summary(name: str) -> str:
    """What a shipped recipe is: the first line of its file, a comment."""
    with open(_find(name), encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip(" .\n")


def field_names(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key of a recipe, dotted: `optimizer.lr`, `amp`, ..."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += field_names(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _configs_dir() -> Path:
    """configs/ inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise LowmemError(f"There is no recipe file {name_or_path}. Shipped recipes: {', '.join(recipe_names())}.")
        return path
    shipped = _configs_dir() / f"{name_or_path}.toml"
    if not shipped.is_file():
        near = difflib.get_close_matches(name_or_path, recipe_names(), n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise LowmemError(
            f"There is no recipe named {name_or_path!r}.{hint} Shipped recipes: {', '.join(recipe_names())}."
        )
    return shipped


def _read_tree(name_or_path: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name_or_path).resolve()
    if path in seen:
        raise LowmemError(f"{path}: its base leads back to itself.")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LowmemError(f"{path}: not a TOML file: {error}") from None
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise LowmemError(f"{path}: base must be the name or file of a recipe, not {base!r}.")
    beside = path.parent / base
    parent = _read_tree(str(beside) if beside.suffix == ".toml" and beside.exists() else base, (*seen, path))
    return _merged(parent, tree)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both_tables else value
    return result


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise LowmemError(f"--set {override}: write --set KEY=VALUE, as in --set optimizer.lr=1e-4.")
    if key not in field_names():
        raise LowmemError(f"--set {override}: there is no key {key!r} in a recipe.{_nearest(key)}")
    *sections, leaf = key.split(".")
    table = tree
    for section in sections:
        table = table.setdefault(section, {})
    if text.strip().lower() in ("none", "null") and key in OPTIONAL_KEYS:
        table.pop(leaf, None)
    else:
        table[leaf] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """A TOML value; anything that is not one is taken as a plain string, so that quotes are not needed in a shell."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nearest(key: str) -> str:
    names = field_names()
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    near = same_leaf or difflib.get_close_matches(key, names, n=1, cutoff=0.3)
    if not near:
        near = [name for name in names if difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1]], cutoff=0.5)]
    return f" The nearest is {near[0]!r}." if near else f" Keys: {', '.join(names)}."


def _explain(item: Any) -> str:
    """One line for one pydantic error: the key, what was given, what is possible."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"  {key}: there is no such key.{_nearest(key)}"
    if item["type"] == "missing":
        return f"  {key}: is missing."
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) or item["type"] == "value_error" else f" (given: {item['input']!r})"
    return f"  {key}: {message[0].lower() + message[1:]}{given}."
