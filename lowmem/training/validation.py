"""The validation after an epoch: in the plan's budget, at the recipe's validation size."""
