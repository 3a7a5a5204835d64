"""What a run keeps: checkpoints, the log of epochs, the best classifier, figures and the report."""

import math
import time
from dataclasses import replace

from lowmem.disk import writing
from lowmem.phases import phase
from lowmem.results.classifier import save_classifier
from lowmem.results.history import EpochRow, append_epoch, read_history
from lowmem.results.plots import plot_run
from lowmem.results.report import write_report
from lowmem.results.run_profile import profile_line
from lowmem.training.evaluate import Evaluation, read_evaluation, write_evaluation
from lowmem.training.run import Run
from lowmem.training.saving import refuse_not_finite
from lowmem.training.schedule import after_epoch, is_best, learning_rate


def save_checkpoint(run: Run, wait: bool = False) -> None:
    """Keep the run as it stands between two steps; written beside the next steps, or, with `wait`, when this returns."""
    check_losses(run)
    with phase("checkpoint"):
        run.saver.save(run.engine, run.state_now())
        run.checkpoint_saved()
        if wait:
            run.saver.wait()


def check_losses(run: Run) -> None:
    """Raises LowmemError naming the first step whose loss is not a finite number."""
    for step, loss in enumerate(run.state.losses, start=1):
        if not math.isfinite(loss):
            raise run.not_finite(loss, step)


def keep_epoch(run: Run, evaluation: Evaluation) -> None:
    """Log a finished epoch, keep its classifier if it is the best so far, and move the state to the next epoch.

    The checkpoint comes last: a run that dies before it trains the epoch again, to the same classifier and row.
    """
    check_losses(run)
    epoch = run.state.epoch
    with phase("checkpoint"):
        row, best = _kept(run, evaluation)
    run.folder.record("epoch", **vars(row), best=best)
    run.progress.epoch(row, best)
    profile = run.profile.end_epoch(epoch, run.recipe.batch.size, run.plan, run.engine.enforcement)
    run.progress.say(profile_line(profile))
    if run.figures_are_due():
        draw_figures(run)


def _kept(run: Run, evaluation: Evaluation) -> tuple[EpochRow, bool]:
    """The epoch's row, and whether it is the best so far; both are on the disk."""
    checkpoint = run.saver.copy(run.engine, run.state_now())
    refuse_not_finite(checkpoint)
    row = epoch_row(run, evaluation)
    best = is_best(run.state.schedule, evaluation.accuracy, evaluation.loss)
    with writing(run.folder.path, "the epoch's results", checkpoint.num_bytes):
        if best:
            save_classifier(run.folder.classifier, run.engine.evaluated_model, run.classifier_info)
            write_evaluation(run.folder.evaluation, evaluation)
        append_epoch(run.folder.epochs, row)
    schedule = after_epoch(
        run.state.schedule, run.recipe.schedule, run.state.epoch, evaluation.accuracy, evaluation.loss
    )
    run.change(epoch=run.state.epoch + 1, step=0, losses=(), schedule=schedule)
    run.saver.write(replace(checkpoint, state=run.state_now()))
    run.checkpoint_saved()
    return row, best


def finish(run: Run) -> None:
    """Mark the run as finished and write its report."""
    run.change(finished=True)
    save_checkpoint(run)
    draw_figures(run)
    with writing(run.folder.path, "the report"):
        write_report(run.folder.path)
    run.saver.wait()
    run.folder.record("finished", best_epoch=run.state.schedule.best_epoch)


def draw_figures(run: Run) -> None:
    if not run.folder.evaluation.is_file():
        return
    budget = run.plan.budget.total_bytes if run.plan.budget else None
    predicted = run.plan.prediction.peak.total if run.plan.prediction else None
    history, evaluation = read_history(run.folder.epochs), read_evaluation(run.folder.evaluation)
    with writing(run.folder.figures, "the figures"):
        plot_run(history, evaluation, run.folder.figures, budget, predicted)


def epoch_row(run: Run, evaluation: Evaluation) -> EpochRow:
    state, clock = run.state, run.clock
    steps = run.steps_per_epoch - clock.first_step
    seconds = time.perf_counter() - clock.started
    return EpochRow(
        epoch=state.epoch,
        train_loss=math.fsum(state.losses) / len(state.losses),
        val_loss=evaluation.loss,
        val_accuracy=evaluation.accuracy,
        val_precision=evaluation.precision,
        val_recall=evaluation.recall,
        val_f1=evaluation.f1,
        lr=learning_rate(
            state.schedule, run.recipe.schedule, state.epoch, run.steps_per_epoch - 1, run.steps_per_epoch
        ),
        seconds=round(seconds, 3),
        train_s=round(clock.train_s, 3),
        eval_s=round(seconds - clock.train_s, 3),
        wait_data_s=round(clock.wait_data_s, 3),
        images_per_s=round(steps * run.recipe.batch.size / max(clock.train_s, 1e-9), 1),
        peak_bytes=run.engine.enforcement.peak_bytes,
    )
