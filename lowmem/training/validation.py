"""The validation after an epoch: in the plan's budget, at the recipe's validation size."""

import time
from collections.abc import Iterator

from lowmem.data.batch import HostBatch
from lowmem.memory.housekeeping import release_cache
from lowmem.memory.limit import is_out_of_memory, recover
from lowmem.memory.meter import host_memory
from lowmem.phases import phase
from lowmem.training.evaluate import Evaluation, evaluate
from lowmem.training.interrupt import StoppedError
from lowmem.training.run import Run


def validate(run: Run) -> Evaluation:
    """Evaluate the model as it stands; a smaller batch takes over where the plan's does not fit. Raises StoppedError when asked
    to stop; a checkpoint after the epoch's last step begins with the validation."""
    run.clock.train_s = time.perf_counter() - run.clock.started
    with phase("evaluation"):
        return _evaluated(run)


def _evaluated(run: Run) -> Evaluation:
    release_cache(run.engine.device)
    batch_size = run.plan.eval_batch
    while True:
        evaluation = _try(run, batch_size)
        if evaluation is not None:
            release_cache(run.engine.device)
            return evaluation
        recover()
        batch_size = max(1, batch_size // 2)
        run.progress.warn(f"The evaluation did not fit into the budget; it goes on with batches of {batch_size}.")


def _try(run: Run, batch_size: int) -> Evaluation | None:
    """The evaluation; None where memory ran out and a smaller batch is possible."""
    batches = until_stopped(in_parts(run.val_loader.batches(), batch_size), run)
    try:
        with run.engine.enforcement.watch(f"evaluation, batch {batch_size}"):
            return evaluate(
                run.engine.evaluated_model,
                batches,
                run.device_input,
                run.plan,
                run.dataset.classes,
                run.recipe.data.val_px,
            )
    except RuntimeError as error:
        if not is_out_of_memory(error) or batch_size == 1:
            raise
    return None


def until_stopped(batches: Iterator[HostBatch], run: Run) -> Iterator[HostBatch]:
    for batch in batches:
        if run.stop.requested:
            raise StoppedError
        yield batch


def in_parts(batches: Iterator[HostBatch], batch_size: int) -> Iterator[HostBatch]:
    """The same images in batches of at most `batch_size`."""
    for batch in batches:
        for start in range(0, len(batch.labels_B), batch_size):
            rows = slice(start, start + batch_size)
            with host_memory():
                part = HostBatch(batch.images_BHWC[rows], batch.labels_B[rows], batch.indices_B[rows])
            yield part
