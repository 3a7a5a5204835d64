"""Recipe: everything that decides which classifier you get, and nothing that decides what it costs.

A recipe is a TOML file. It may build on another one (`base = "name"`), and `--set section.key=value` overrides any
field. Every field below is checked when the recipe is loaded; a wrong key names the nearest right one.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowmem.errors import LowmemError

Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=16, le=4096)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Range = tuple[float, float]

AmpDtype = Literal["auto", "bf16", "fp16", "fp32"]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelRecipe(Section):
    name: Annotated[str, Field(min_length=1)]
    """A timm model, with or without its weights' tag: `resnet50`, `seresnet152d.ra2_in1k`."""
    weights: str = "pretrained"
    """Where the initial weights come from: `pretrained` (timm's hub), `none`, `file:PATH`, `package:NAME/PATH`."""
    weights_optional: bool = False
    """Whether to start from random weights, and say so, where the package or file of `weights` is missing."""
    head_init: Literal["timm", "zero"] = "timm"
    """Start of a new head: timm's own, or zeros, which leave the features undisturbed at the first steps."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the classifier head."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth."""
    freeze_batchnorm: bool = False
    """Normalise with the running statistics of the initial weights and leave them unchanged."""


class DataRecipe(Section):
    train_px: Pixels = 224
    val_px: Pixels = 224
    test_px: Pixels = 224
    crop_frac: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    """Evaluation keeps this central part of an image whose short side was resized to `px / crop_frac`."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each class held out where the data folder has no val/ of its own."""


class AugmentRecipe(Section):
    """The experiment's augmentation; its order is blur, crop, sharpen, jitter, grey, flip. Zero switches a part off."""

    blur_prob: Probability = 0.0
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the Gaussian blur in pixels of the original image, drawn uniformly."""
    crop_scale: Range = (0.08, 1.0)
    """Area of the random crop as a share of the image, drawn uniformly; (1, 1) with crop_ratio (1, 1) is a centre crop."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop, drawn log-uniformly."""
    sharpen_prob: Probability = 0.0
    sharpen_factor: Annotated[float, Field(ge=0, le=10)] = 2.0
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grey_prob: Probability = 0.0
    flip_prob: Probability = 0.5

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> "AugmentRecipe":
        for name, low_limit, high_limit in (("blur_sigma", 0, 50), ("crop_scale", 1e-3, 1), ("crop_ratio", 0.1, 10)):
            low, high = getattr(self, name)
            if not low_limit <= low <= high <= high_limit:
                raise ValueError(f"{name} must be two ascending numbers from {low_limit} to {high_limit}")
        return self


class MixupRecipe(Section):
    prob: Probability = 0.0
    """Share of batches that are mixed."""
    alpha: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The mixing weight is drawn from Beta(alpha, alpha) (Zhang et al., 2018)."""


class LossRecipe(Section):
    class_weights: Literal["none", "reciprocal", "balanced"] = "none"
    """`reciprocal`: 1 / count of the class; `balanced`: images / (classes x count). Both are normalised over the batch."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0


class OptimizerRecipe(Section):
    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-3
    betas: Annotated[tuple[Probability, Probability], Field()] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest global norm of the gradient; absent means no clipping."""


class LrReset(Section):
    epoch: Annotated[int, Field(ge=1)]
    """First epoch (counted from 1) trained at the new rate."""
    lr: Annotated[float, Field(gt=0, le=10)]


class ScheduleRecipe(Section):
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 100
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs over which the learning rate rises linearly to optimizer.lr."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The learning rate is multiplied by this when neither validation accuracy nor loss improved for `patience` epochs."""
    patience: Annotated[int, Field(ge=1)] = 2
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    resets: tuple[LrReset, ...] = ()
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Stop after this many epochs without a better validation accuracy or loss; 0 never stops early."""


class BatchRecipe(Section):
    size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Images per optimiser step."""
    norm_batch: Annotated[int, Field(ge=1)] | None = None
    """Images that share batch-norm statistics; a divisor of `size`. Absent: the whole batch."""

    @property
    def atom(self) -> int:
        """Images per atom: the norm batch."""
        return self.norm_batch or self.size

    @property
    def num_atoms(self) -> int:
        return self.size // self.atom

    @model_validator(mode="after")
    def _atoms_fill_the_batch(self) -> "BatchRecipe":
        if self.norm_batch is not None and self.size % self.norm_batch:
            raise ValueError(f"norm_batch {self.norm_batch} does not divide size {self.size}")
        return self


class Recipe(Section):
    """Which classifier: the whole of it."""

    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    mixup: MixupRecipe = MixupRecipe()
    loss: LossRecipe = LossRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    batch: BatchRecipe = BatchRecipe()
    amp: AmpDtype = "auto"
    """Arithmetic of the forward pass. `auto` is settled by the device once, before the first step: bf16 where the card
    computes in it, fp16 on older cards, fp32 on a CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def to_toml(self) -> str:
        """The recipe as a file that `--recipe` reads."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


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
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.exists():
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
    if text.strip().lower() in ("none", "null") and key in ("optimizer.clip_norm", "batch.norm_batch"):
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
