"""How fast each weight learns and decays: one rate for all, or by timm's parameter groups."""

from dataclasses import dataclass
from typing import Any

from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from lowmem.recipe import OptimizerRecipe


@dataclass(frozen=True)
class Rates:
    """`lr_scale` multiplies the learning rate of the step."""

    lr_scale: float
    weight_decay: float


def rates_by_name(model: nn.Module, recipe: OptimizerRecipe) -> dict[str, Rates]:
    """The rates of every trainable weight, in the model's order."""
    found = {
        id(parameter): Rates(group.get("lr_scale", 1.0), group["weight_decay"])
        for group in _groups(model, recipe)
        for parameter in group["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def _groups(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    exempt = model.no_weight_decay() if recipe.exclude_norm_and_bias and hasattr(model, "no_weight_decay") else ()
    if recipe.layer_decay is not None:
        return param_groups_layer_decay(
            model,
            weight_decay=recipe.weight_decay,
            weight_decay_exclude_1d=recipe.exclude_norm_and_bias,
            no_weight_decay_list=exempt,
            layer_decay=recipe.layer_decay,
        )
    if recipe.exclude_norm_and_bias:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=exempt)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": recipe.weight_decay}]
