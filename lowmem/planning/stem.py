"""What a network computes before its first block, as a module of its own: a plan may hold, move or make again what it saves, too."""

from typing import Any

from torch import nn


class Stem(nn.Module):
    """Callable as the network is; gives the first block's arguments."""

    def __init__(self, model: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.model, self.first = model, first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.first.forward = _stop  # type: ignore[method-assign]
        try:
            self.model(*args, **kwargs)
        except _Reached as reached:
            return reached.given
        finally:
            del self.first.__dict__["forward"]
        raise RuntimeError("the first block was not run")


class _Reached(Exception):
    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise _Reached((args, kwargs))
