"""The blocks of a network: where a plan can choose what to keep and what to recompute.

A block is the innermost repeated unit, whatever it is called: a child of a list-like container, or one of several children of
the same class, that holds at least two weight layers and a norm or an activation, and holds no such child itself. That finds
ResNet's bottlenecks, EfficientNet's inverted residuals, the layers of transformers, DenseNet's dense layers and the blocks
inside the stages of Swin or ConvNeXt. Networks without blocks (VGG) have none and are planned as a whole.
"""

from collections.abc import Iterator

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by their path in the model, in the order of registration; no block contains another."""
    listed = dict(_children_of_lists(model))
    repeated = {
        path: module
        for path, module in _repeated_children(model)
        if not any(path.startswith(other + ".") for other in listed)
    }
    candidates = listed | repeated
    return {
        path: module
        for path, module in model.named_modules()
        if path in candidates and not any(other.startswith(path + ".") for other in candidates)
    }


def _children_of_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(module, LISTS):
            yield from _composite_children(path, module)


def _repeated_children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children that stand beside another of their class, under names of their own (RegNet's b1, b2; DLA's tree1, tree2)."""
    for path, module in model.named_modules():
        children = [] if isinstance(module, LISTS) else list(_composite_children(path, module))
        classes = [type(child) for _, child in children]
        yield from ((name, child) for name, child in children if classes.count(type(child)) > 1)


def _composite_children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if not isinstance(child, LISTS) and _is_composite(child):
            yield f"{path}.{name}" if path else name, child


def _is_composite(module: nn.Module) -> bool:
    """At least two weight layers, and something between them that is worth recomputing."""
    leaves = [part for part in module.modules() if not any(True for _ in part.children())]
    num_weights = sum(isinstance(part, WEIGHT_LAYERS) for part in leaves)
    return num_weights >= 2 and any(not isinstance(part, (*WEIGHT_LAYERS, nn.Identity, nn.Dropout)) for part in leaves)
