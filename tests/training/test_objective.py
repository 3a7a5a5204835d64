import torch
import torch.nn.functional as F

from lowmem.data.batch import Targets
from lowmem.recipe import LossRecipe
from lowmem.training.objective import Objective, class_weights

COUNTS_K = torch.tensor([10, 1, 4])


def batch():
    torch.manual_seed(0)
    return torch.randn(12, 3, dtype=torch.float32), torch.randint(0, 3, (12,)), torch.randint(0, 3, (12,))


def test_class_weights():
    assert torch.equal(class_weights("none", COUNTS_K), torch.ones(3))
    assert torch.allclose(class_weights("reciprocal", COUNTS_K), torch.tensor([0.1, 1.0, 0.25]))
    assert torch.allclose(class_weights("balanced", COUNTS_K), torch.tensor([15 / 30, 15 / 3, 15 / 12]))
    assert class_weights("reciprocal", torch.tensor([0, 2]))[0] == 0


def test_a_batch_in_parts_has_the_loss_of_the_whole_and_the_mean_of_means_has_not():
    logits_BK, labels_B, _ = batch()
    objective = Objective(LossRecipe(class_weights="reciprocal", label_smoothing=0.1), COUNTS_K, "cpu")
    whole = F.cross_entropy(logits_BK, labels_B, weight=objective.weights_K, label_smoothing=0.1)
    targets = Targets(labels_B)
    total = objective.total_weight(targets)
    parts = sum(objective.loss_sum(logits_BK[i : i + 4], targets.rows(i, i + 4)) / total for i in (0, 4, 8))
    assert torch.allclose(parts, whole, rtol=1e-6)
    means = (
        sum(
            F.cross_entropy(logits_BK[i : i + 4], labels_B[i : i + 4], weight=objective.weights_K, label_smoothing=0.1)
            for i in (0, 4, 8)
        )
        / 3
    )
    assert not torch.allclose(means, whole, rtol=1e-3)


def test_mixup_is_two_weighted_hard_label_terms():
    logits_BK, labels_B, partners_B = batch()
    objective = Objective(LossRecipe(class_weights="reciprocal"), COUNTS_K, "cpu")
    targets = Targets(labels_B, partners_B, 0.3)
    w, lam = objective.weights_K, 0.3
    terms = lam * F.cross_entropy(logits_BK, labels_B, reduction="none") * w[labels_B]
    terms = terms + (1 - lam) * F.cross_entropy(logits_BK, partners_B, reduction="none") * w[partners_B]
    expected = terms.sum() / (lam * w[labels_B].sum() + (1 - lam) * w[partners_B].sum())
    assert torch.allclose(objective.loss_sum(logits_BK, targets) / objective.total_weight(targets), expected, rtol=1e-6)


def test_mixup_of_equal_labels_is_no_mixup():
    logits_BK, labels_B, _ = batch()
    objective = Objective(LossRecipe(class_weights="reciprocal"), COUNTS_K, "cpu")
    plain, mixed = Targets(labels_B), Targets(labels_B, labels_B, 0.3)
    one = objective.loss_sum(logits_BK, plain) / objective.total_weight(plain)
    assert torch.allclose(one, objective.loss_sum(logits_BK, mixed) / objective.total_weight(mixed), rtol=1e-6)


def test_divided_by_images_it_is_pytorchs_mean_over_soft_targets():
    logits_BK, labels_B, partners_B = batch()
    objective = Objective(LossRecipe(class_weights="reciprocal", divide_by="images"), COUNTS_K, "cpu")
    targets = Targets(labels_B, partners_B, 0.3)
    soft_BK = 0.3 * F.one_hot(labels_B, 3) + 0.7 * F.one_hot(partners_B, 3)
    expected = F.cross_entropy(logits_BK, soft_BK, weight=objective.weights_K)
    loss = objective.loss_sum(logits_BK, targets) / objective.total_weight(targets)
    assert torch.allclose(loss, expected, rtol=1e-6)
    by_weights = Objective(LossRecipe(class_weights="reciprocal"), COUNTS_K, "cpu")
    assert not torch.allclose(by_weights.loss_sum(logits_BK, targets) / by_weights.total_weight(targets), expected)
