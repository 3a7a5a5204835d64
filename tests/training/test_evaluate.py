import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)
from torch import nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.planning.plan import Plan
from lowmem.training.evaluate import evaluate, read_evaluation, write_evaluation

PLAN = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=4)
NUM_CLASSES = 7


class Lookup(nn.Module):
    """Logits that depend on the first pixel of an image alone."""

    def __init__(self, logits_NK):
        super().__init__()
        self.logits_NK = logits_NK

    def forward(self, images_BCHW):
        return self.logits_NK[(images_BCHW[:, 0, 0, 0] * 255).round().long()]


def images(numbers):
    images_BHWC = torch.zeros(len(numbers), 2, 2, 3, dtype=torch.uint8)
    images_BHWC[:, 0, 0, 0] = torch.as_tensor(numbers)
    return images_BHWC


@pytest.fixture
def case():
    random = np.random.default_rng(0)
    logits_NK = random.normal(size=(100, NUM_CLASSES)) * 2
    logits_NK[:, 5] = -15  # never predicted
    labels_N = random.integers(0, 6, 100)  # class 6 never occurs
    return torch.tensor(logits_NK, dtype=torch.float32), torch.tensor(labels_N)


def evaluated(logits_NK, labels_N, batch_size):
    batches = [
        HostBatch(
            images(range(start, min(start + batch_size, 100))),
            labels_N[start : start + batch_size],
            torch.arange(batch_size),
        )
        for start in range(0, 100, batch_size)
    ]
    device_input = DeviceInput(Normalisation((0.0,) * 3, (1.0,) * 3), torch.device("cpu"), "channels_last")
    return evaluate(Lookup(logits_NK), batches, device_input, PLAN, tuple("abcdefg"))


def test_metrics_are_scikit_learns(case):
    logits_NK, labels_N = case
    found = evaluated(logits_NK, labels_N, 9)
    guesses, truths = logits_NK.argmax(1).numpy(), labels_N.numpy()
    assert found.accuracy == pytest.approx(accuracy_score(truths, guesses))
    for value, reference in ((found.precision, precision_score), (found.recall, recall_score), (found.f1, f1_score)):
        assert value == pytest.approx(reference(truths, guesses, average="macro", zero_division=0))
    assert found.top5 == pytest.approx(top_k_accuracy_score(truths, logits_NK.numpy(), k=5, labels=range(NUM_CLASSES)))
    assert found.loss == pytest.approx(
        log_loss(truths, logits_NK.double().softmax(1).numpy(), labels=range(NUM_CLASSES)), rel=1e-5
    )
    assert np.array_equal(np.array(found.confusion), confusion_matrix(truths, guesses, labels=range(NUM_CLASSES)))


def test_the_batch_size_does_not_show(case):
    a, b = evaluated(*case, 100), evaluated(*case, 7)
    assert a.confusion == b.confusion and a.accuracy == b.accuracy and a.loss == pytest.approx(b.loss, rel=1e-6)


def test_logits_that_are_not_numbers_are_seen(case):
    logits_NK, labels_N = case
    logits_NK[3, 2] = float("nan")
    assert not evaluated(logits_NK, labels_N, 10).is_finite


def test_round_trip(case, tmp_path):
    found = evaluated(*case, 10)
    write_evaluation(tmp_path / "e.json", found)
    assert read_evaluation(tmp_path / "e.json") == found
