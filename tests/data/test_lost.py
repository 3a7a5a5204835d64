"""What follows from a lost worker, for every way to lose one."""

import re
import signal

import pytest

from lowmem.data import lost
from lowmem.data.lost import MAX_RESTARTS, SILENT_S, START_S, Loss, Losses, is_too_silent

KILLED = -getattr(signal, "SIGKILL", 9)


@pytest.fixture
def kills(monkeypatch):
    """The kernel's counter of memory kills, which a test cannot make true."""
    counter = [3]
    monkeypatch.setattr(lost, "num_oom_kills", lambda: counter[0])
    return counter


def loss(code=1, hung=False, started=True):
    return Loss("Loader worker 1", code, hung, started)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"code": 7}, r"died \(exit code 7\)"),
        ({"code": -signal.SIGTERM}, r"died \(SIGTERM\)"),
        ({"code": KILLED}, "died"),
        ({"code": KILLED, "hung": True}, "no sign of life for 8 s"),
    ],
)
def test_one_that_died_or_hung_is_replaced(kills, how, words):
    verdict = Losses().judge(loss(**how), num_left=0)
    assert verdict.replacement and not verdict.fatal
    assert re.search(words, verdict.text)


@pytest.mark.parametrize("code", [KILLED, 0xC0000017, 0xC000012D - 2**32])
def test_one_that_memory_was_wanting_for_is_not_replaced_and_the_last_ends_the_run(kills, code):
    losses = Losses()
    for num_left, ending in ((1, "goes on with 1"), (0, "it was the last one")):
        kills[0] += 1
        verdict = losses.judge(loss(code), num_left)
        assert not verdict.replacement and verdict.fatal == (num_left == 0) and ending in verdict.text


def test_a_memory_kill_of_another_program_is_counted_once(kills):
    losses = Losses()
    kills[0] += 1
    assert not losses.judge(loss(KILLED), 1).replacement
    assert losses.judge(loss(KILLED), 1).replacement


def test_too_many_losses_and_a_worker_that_never_started_end_the_run(kills):
    losses = Losses()
    assert all(losses.judge(loss(), 1).replacement for _ in range(MAX_RESTARTS))
    for verdict in (losses.judge(loss(), 1), Losses().judge(loss(started=False), 1)):
        assert verdict.fatal and not verdict.replacement and "--loader threads" in verdict.text


def test_a_start_may_take_longer_than_silence():
    assert not is_too_silent(SILENT_S, True) and is_too_silent(SILENT_S + 0.1, True)
    assert not is_too_silent(SILENT_S + 0.1, False) and is_too_silent(START_S + 0.1, False)
