"""AdamW's arithmetic and its state, the same in every placement."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowmem.errors import LowmemError
from lowmem.memory.rates import Rates
from lowmem.recipe import OptimizerRecipe

STATE_NAMES = ("exp_avg", "exp_avg_sq")
Named = dict[str, nn.Parameter]


class AdamW:
    """Torch's fused kernel, each weight at its own rates."""

    def __init__(self, recipe: OptimizerRecipe, rates: dict[str, Rates]) -> None:
        self.recipe, self.rates, self.lr = recipe, rates, recipe.lr

    def update(
        self,
        names: list[str],
        parameters: list[Any],
        grads: list[Any],
        states: list[dict[str, Tensor]],
        found_inf: Tensor | None = None,
    ) -> None:
        """Update weights, or parts of them, whose rates go by `names`; where `found_inf` (on the device) is 1 nothing changes."""
        together: dict[Rates, list[int]] = {}
        for index, name in enumerate(names):
            together.setdefault(self.rates[name], []).append(index)
        for rates, chosen in together.items():
            parts = ([items[index] for index in chosen] for items in (parameters, grads, states))
            self._apply(rates, found_inf, *parts)

    def groups(self, named: Named) -> list[dict[str, Any]]:
        """Groups for a torch optimizer; `lr_scale` multiplies the rate of a step."""
        together: dict[Rates, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            together.setdefault(self.rates[name], []).append(parameter)
        return [
            {"params": parameters, "lr_scale": rates.lr_scale, "weight_decay": rates.weight_decay}
            for rates, parameters in together.items()
        ]

    def _apply(
        self,
        rates: Rates,
        found_inf: Tensor | None,
        parameters: list[Any],
        grads: list[Any],
        states: list[dict[str, Tensor]],
    ) -> None:
        with torch.no_grad():
            adamw(
                parameters,
                grads,
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.recipe.betas[0],
                beta2=self.recipe.betas[1],
                lr=self.lr * rates.lr_scale,
                weight_decay=rates.weight_decay,
                eps=self.recipe.eps,
                maximize=False,
            )


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, in the layout of the weight."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    for kind in STATE_NAMES:
        state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state


def check_names(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    if set(own) != set(given):
        odd = sorted(set(own) ^ set(given))
        raise LowmemError(f"The optimizer's state does not fit the model: {odd[0]} and {len(odd) - 1} more.")


def copy_state(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    check_names(own, given)
    for name, tensor in own.items():
        tensor.copy_(given[name])
