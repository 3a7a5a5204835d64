import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from lowmem.recipe import Recipe
from lowmem.training.schedule import after_epoch, at_epoch_start, first_state, is_best, learning_rate, stops_early


def recipe(**schedule):
    return Recipe.model_validate({"model": {"name": "resnet18"}, "optimizer": {"lr": 1.0}, "schedule": schedule})


def rates(made, metrics):
    """Learning rate of the last step of each epoch, given (accuracy, loss) after each."""
    state, found = first_state(made), []
    for epoch, (accuracy, loss) in enumerate(metrics, start=1):
        state = at_epoch_start(state, made.schedule, epoch)
        found.append(learning_rate(state, made.schedule, epoch, 9, 10))
        state = after_epoch(state, made.schedule, epoch, accuracy, loss)
    return found, state


def test_warm_up_is_linear_and_ends_at_the_rate():
    made = recipe(warmup_epochs=2)
    steps = [learning_rate(first_state(made), made.schedule, epoch, step, 4) for epoch in (1, 2) for step in range(4)]
    assert steps == pytest.approx([k / 8 for k in range(1, 9)])
    assert learning_rate(first_state(made), made.schedule, 3, 0, 4) == 1.0


def test_decay_only_when_neither_accuracy_nor_loss_improved_for_patience_epochs():
    made = recipe(patience=2, decay_factor=0.5)
    better_loss_only = [(0.5, 1.0), (0.4, 0.9), (0.4, 0.8), (0.4, 0.7), (0.4, 0.6)]
    assert rates(made, better_loss_only)[0] == [1, 1, 1, 1, 1]
    stale = [(0.5, 1.0)] + [(0.4, 1.1)] * 5
    assert rates(made, stale)[0] == [1, 1, 1, 0.5, 0.5, 0.25]


def test_no_decay_during_warm_up():
    made = recipe(patience=1, warmup_epochs=3)
    assert rates(made, [(0.5, 1.0)] + [(0.4, 1.1)] * 4)[0] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.5])


def test_reset_sets_the_rate_and_decay_goes_on_from_there():
    made = recipe(patience=1, resets=[{"epoch": 4, "lr": 0.01}])
    assert rates(made, [(0.5, 1.0)] + [(0.4, 1.1)] * 5)[0] == [1, 1, 0.5, 0.01, 0.005, 0.0025]


def test_early_stop_counts_epochs_without_improvement():
    made = recipe(early_stopping=3)
    _, state = rates(made, [(0.5, 1.0), (0.4, 1.1), (0.4, 1.1)])
    assert not stops_early(state, made.schedule)
    _, state = rates(made, [(0.5, 1.0), (0.4, 1.1), (0.4, 1.1), (0.4, 1.1)])
    assert stops_early(state, made.schedule)
    assert not stops_early(state, recipe().schedule)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_never_best(bad):
    made = recipe()
    state = first_state(made)
    assert not is_best(state, bad, 1.0) and not is_best(state, 0.5, bad)
    state = after_epoch(state, made.schedule, 1, bad, bad)
    assert state.best_accuracy is None and state.best_loss is None
    state = after_epoch(state, made.schedule, 2, 0.1, 3.0)
    assert (state.best_epoch, state.best_accuracy, state.best_loss) == (2, 0.1, 3.0)


def test_ties_go_to_the_lower_loss():
    made = recipe()
    state = after_epoch(first_state(made), made.schedule, 1, 0.5, 1.0)
    assert is_best(state, 0.5, 0.9) and not is_best(state, 0.5, 1.0) and not is_best(state, 0.4, 0.1)


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_cosine_is_timms(warmup):
    made = recipe(kind="cosine", epochs=5, warmup_epochs=warmup, min_lr=0.01)
    num_steps, state = 7, first_state(made)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    timms = CosineLRScheduler(
        optimizer, t_initial=(5 - warmup) * num_steps, lr_min=0.01, warmup_t=warmup * num_steps, warmup_prefix=True, t_in_epochs=False
    )  # fmt: skip
    for epoch in range(warmup + 1, 6):
        state = at_epoch_start(state, made.schedule, epoch)
        for step in range(num_steps):
            timms.step_update((epoch - 1) * num_steps + step)
            assert learning_rate(state, made.schedule, epoch, step, num_steps) == optimizer.param_groups[0]["lr"]
        state = after_epoch(state, made.schedule, epoch, 0.1, 1.0)
    timms.step_update(5 * num_steps)
    assert learning_rate(state, made.schedule, 6, 0, num_steps) == 0.01 == optimizer.param_groups[0]["lr"]


def test_a_cosine_has_no_resets():
    with pytest.raises(ValueError, match="plateau"):
        recipe(kind="cosine", resets=[{"epoch": 2, "lr": 0.1}])
