"""Classification metrics: closed forms, ties, refusals, and the registry of metrics."""

from __future__ import annotations

import pytest
import torch

from mmalign.errors import DataError
from mmalign.metrics import METRICS, higher_is_better
from mmalign.metrics.classification import (
    accuracy,
    expected_calibration_error,
    harmonic_mean,
    mean_class_accuracy,
    top_k_accuracy,
)

SCORES = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
LABELS = torch.tensor([0, 0, 1, 2])


def test_top_k():
    assert top_k_accuracy(SCORES, LABELS) == 0.25
    assert top_k_accuracy(SCORES, LABELS, k=2) == 0.75  # a tie goes to the lower index: class 1 is second of three
    assert top_k_accuracy(SCORES, LABELS, k=3) == 1.0
    assert top_k_accuracy(SCORES, LABELS) == accuracy(SCORES.argmax(1), LABELS)


def test_accuracy_of_strings_and_mean_over_classes():
    assert accuracy(["cat", "dog"], ["cat", "cat"]) == 0.5
    assert mean_class_accuracy(SCORES, LABELS) == pytest.approx((0.5 + 0 + 0) / 3)
    assert harmonic_mean(0.8, 0.4) == pytest.approx(2 * 0.32 / 1.2)
    assert harmonic_mean(0, 0) == 0


def test_calibration_error():
    sure = torch.tensor([[1.0, 0.0]] * 4)
    assert expected_calibration_error(sure, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
    calibrated = torch.tensor([[0.75, 0.25]] * 4)
    assert expected_calibration_error(calibrated, torch.tensor([0, 0, 0, 1])) == pytest.approx(0, abs=1e-7)
    mixed = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert expected_calibration_error(mixed, torch.tensor([0, 1]), bins=10) == pytest.approx((0.1 + 0.6) / 2)
    assert expected_calibration_error(mixed, torch.tensor([0, 1]), bins=1) == pytest.approx(abs(0.5 - 0.75))


def test_directions_are_declared():
    assert all(hasattr(METRICS.get(name), "higher_is_better") for name in METRICS)
    assert higher_is_better("accuracy")
    assert not higher_is_better("ece")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_accuracy(SCORES, LABELS, k=4), "k=4"), (lambda: top_k_accuracy(SCORES, LABELS[:2]), "labels"),
        (lambda: top_k_accuracy(SCORES * float("nan"), LABELS), "NaN"), (lambda: accuracy([], []), "at least one"),
        (lambda: accuracy([1], [1, 2]), "1 predictions for 2 labels"),
        (lambda: top_k_accuracy(SCORES, LABELS + 2), "reach from 2 to 4"),
        (lambda: expected_calibration_error(SCORES, LABELS), "softmax"), (lambda: harmonic_mean(-1, 1), "negative"),
        (lambda: mean_class_accuracy(SCORES[:0], LABELS[:0]), "at least one"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(DataError, match=message):
        call()
