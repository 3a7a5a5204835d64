"""Everything that decides which classifier you get: its fields, and how they are read from files."""

from lowmem.recipe.fields import (
    AmpDtype,
    AugmentRecipe,
    BatchRecipe,
    DataRecipe,
    EmaRecipe,
    LossRecipe,
    LrReset,
    MixupRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    ScheduleRecipe,
)
from lowmem.recipe.loading import (
    field_names,
    load_recipe,
    recipe_from_tree,
    recipe_names,
    recipe_summary,
    with_overrides,
)

__all__ = [
    "AmpDtype",
    "AugmentRecipe",
    "BatchRecipe",
    "DataRecipe",
    "EmaRecipe",
    "LossRecipe",
    "LrReset",
    "MixupRecipe",
    "ModelRecipe",
    "OptimizerRecipe",
    "Recipe",
    "ScheduleRecipe",
    "field_names",
    "load_recipe",
    "recipe_from_tree",
    "recipe_names",
    "recipe_summary",
    "with_overrides",
]
