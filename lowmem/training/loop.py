"""The run, on one screen: epochs of steps, a validation after each, and what is kept of it.

Start reading here. What varies between recipes and plans is in the objects of `Run`, chosen before the loop starts.
"""

import time
from collections.abc import Iterator

from lowmem.data.batch import HostBatch
from lowmem.memory.housekeeping import collect_garbage
from lowmem.phases import phase
from lowmem.training import keeping
from lowmem.training.engine import OutOfBudgetError
from lowmem.training.interrupt import StoppedError
from lowmem.training.losses import StepLosses
from lowmem.training.run import Run
from lowmem.training.schedule import at_epoch_start, learning_rate, stops_early
from lowmem.training.validation import validate


def train(run: Run) -> None:
    """Train until the recipe's epochs are over or it stops early; raises StoppedError, with a checkpoint, when asked to stop."""
    schedule = run.recipe.schedule
    try:
        while run.state.epoch <= schedule.epochs and not stops_early(run.state.schedule, schedule):
            train_epoch(run)
            evaluation = validate(run)
            keeping.keep_epoch(run, evaluation)
            collect_garbage()
            if run.stop.requested:
                raise StoppedError
    except StoppedError:
        keeping.save_checkpoint(run, wait=True)
        raise
    keeping.finish(run)


def train_epoch(run: Run) -> None:
    """The steps of one epoch that are still to do."""
    run.begin_epoch()
    if run.state.step == 0:
        run.change(schedule=at_epoch_start(run.state.schedule, run.recipe.schedule, run.state.epoch))
    while run.state.step < run.steps_per_epoch:
        try:
            train_steps(run)
        except OutOfBudgetError as error:
            run.use_leaner_plan(error)  # the steps go on where the state stands


def train_steps(run: Run) -> None:
    """Steps from where the state stands to the end of the epoch."""
    losses = StepLosses(run.steps_per_epoch, run.engine.device, run.state.losses)
    try:
        for batch in timed(run.train_loader.batches(run.state.epoch, run.state.step), run):
            state = run.state
            lr = learning_rate(state.schedule, run.recipe.schedule, state.epoch, state.step, run.steps_per_epoch)
            losses.put(run.engine.train_step(batch, run.device_input, state.epoch, state.step, lr))
            run.change(step=state.step + 1)
            run.show_step(losses.latest(), lr)
            run.pressure.step()
            if run.checkpoint_is_due():
                run.change(losses=losses.values())
                keeping.save_checkpoint(run)
            if run.stop.requested:
                raise StoppedError
    finally:
        run.change(losses=losses.values())


def timed(batches: Iterator[HostBatch], run: Run) -> Iterator[HostBatch]:
    """The batches, with the time spent waiting for each added to the run's clock."""
    while True:
        started = time.perf_counter()
        with phase("waiting"):
            batch = next(batches, None)
        run.clock.wait_data_s += time.perf_counter() - started
        if batch is None:
            return
        yield batch
