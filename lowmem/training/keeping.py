"""What a run keeps: checkpoints, the log of epochs, the best classifier, figures and the report."""

import time

from lowmem.errors import LowmemError
from lowmem.results.classifier import save_classifier
from lowmem.results.history import EpochRow, append_epoch, read_history
from lowmem.results.plots import plot_run
from lowmem.results.report import write_report
from lowmem.training.checkpoint import write_checkpoint
from lowmem.training.evaluate import Evaluation, read_evaluation, write_evaluation
from lowmem.training.run import Run
from lowmem.training.schedule import after_epoch, is_best


def save_checkpoint(run: Run) -> None:
    """Write the run as it stands between two steps."""
    started = time.perf_counter()
    check_losses(run)
    path = write_checkpoint(run.folder.checkpoints, run.snapshot())
    run.checkpoint_saved()
    run.folder.record("checkpoint", path=path.name, seconds=round(time.perf_counter() - started, 3))


def check_losses(run: Run) -> None:
    """Raises LowmemError naming the first step whose loss is not a finite number."""
    for step, loss in enumerate(run.state.losses, start=1):
        if not abs(loss) < float("inf"):
            raise run.not_finite(loss, step)


def keep_epoch(run: Run, evaluation: Evaluation) -> None:
    """Log a finished epoch, keep its classifier if it is the best so far, and move the state to the next epoch."""
    check_losses(run)
    row = epoch_row(run, evaluation)
    best = is_best(run.state.schedule, evaluation.accuracy, evaluation.loss)
    if best:
        save_classifier(run.folder.classifier, run.engine.model, run.classifier_info)
        write_evaluation(run.folder.evaluation, evaluation)
    append_epoch(run.folder.epochs, row)
    schedule = after_epoch(run.state.schedule, run.recipe.schedule, run.state.epoch, evaluation.accuracy, evaluation.loss)
    run.change(epoch=run.state.epoch + 1, step=0, losses=(), schedule=schedule)
    save_checkpoint(run)
    run.progress.epoch(row, best)
    draw(run)


def finish(run: Run) -> None:
    """Mark the run as finished and write its report."""
    run.change(finished=True)
    save_checkpoint(run)
    report = write_report(run.folder.path)
    run.folder.record("finished", best_epoch=run.state.schedule.best_epoch, report=report.name)


def draw(run: Run) -> None:
    if run.folder.evaluation.is_file():
        plot_run(read_history(run.folder.epochs), read_evaluation(run.folder.evaluation), run.folder.figures)


def epoch_row(run: Run, evaluation: Evaluation) -> EpochRow:
    raise LowmemError("to be written")
