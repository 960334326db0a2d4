"""The gate's decisions and the evaluation's numbers."""
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from nbs_lib.core.settings import Gate
from nbs_lib.evaluation.gate import decide, paired_bootstrap
from nbs_lib.evaluation.measure import align, calibration_error, confident_mistakes, measure

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 3, 400)
CLASSES = {"animal": ["bird", "cat", "dog"]}


def answers(rate: float, spoilt: int | None = None, seed: int = 1) -> dict:
    right = np.random.default_rng(seed).random(400) < rate
    if spoilt is not None: right &= spoilt != Y
    return {"animal": np.where(right, Y, (Y + 1) % 3)}


@pytest.mark.parametrize(("candidate", "production", "promoted", "word"), [
    (answers(0.95), None, True, "first"),
    (answers(0.80), None, False, "minimum"),
    (answers(0.95), answers(0.95), True, "not worse"),
    (answers(0.99), answers(0.90), True, "not worse"),
    (answers(0.90), answers(0.99, seed=2), False, "margin"),
    (answers(0.99, spoilt=1), answers(0.9), False, "'cat'"),
])
def test_decisions(candidate, production, promoted, word):
    decision = decide({"animal": Y}, CLASSES, candidate, production, Gate())
    assert decision.promote == promoted and word in " ".join(decision.reasons)
    assert decision.accuracy["animal"] == accuracy_score(Y, candidate["animal"])


def test_a_missing_label_judges_nobody():
    hidden = np.where(np.arange(400) < 200, -1, Y)
    labels, said = {"animal": hidden, "size": np.full(400, -1)}, answers(0.95) | {"size": np.zeros(400, int)}
    decision = decide(labels, CLASSES | {"size": ["big"]}, said, None, Gate())
    assert not decision.promote and "size: no labelled test image" in decision.reasons[0]
    assert decision.accuracy["animal"] == accuracy_score(Y[200:], answers(0.95)["animal"][200:])


def test_the_loss_of_one_image_in_a_small_class_is_chance():
    y = np.array([0] * 380 + [1] * 20)
    good, one_wrong = np.where(np.arange(400) < 0, 1, y), np.where(np.arange(400) == 399, 0, y)
    gate = Gate(class_margin=0.01)
    assert decide({"animal": y}, CLASSES, {"animal": one_wrong}, {"animal": good}, gate).promote
    many_wrong = np.where(np.arange(400) >= 390, 0, y)
    assert not decide({"animal": y}, CLASSES, {"animal": many_wrong}, {"animal": good}, gate).promote


def test_the_bootstrap_agrees_with_resampling_image_by_image():
    difference = answers(0.95)["animal"] == Y
    difference = difference * 1.0 - (answers(0.9, seed=5)["animal"] == Y)
    slow = np.random.default_rng(0).choice(difference, (4000, 400)).mean(1)
    mean, low, high = paired_bootstrap(difference, 4000)
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.004)


def test_numbers_are_those_of_scikit_learn():
    p = RNG.dirichlet([1, 1, 1], 400)
    overall, rows = measure(Y, p, CLASSES["animal"])
    assert overall["macro_f1"] == pytest.approx(f1_score(Y, p.argmax(1), average="macro"))
    assert overall["accuracy"] == accuracy_score(Y, p.argmax(1))
    assert rows["images"].sum() == 400 and rows["f1"].is_monotonic_increasing


def test_a_class_without_test_images_does_not_count():
    overall, rows = measure(np.array([0, 1]), np.eye(3)[[0, 1]], CLASSES["animal"])
    assert overall["macro_recall"] == 1.0 and rows.loc["dog", "images"] == 0


def test_calibration_error_of_a_liar():
    assert calibration_error(np.zeros(10, int), np.tile([0.2, 0.8], (10, 1))) == pytest.approx(0.8)


def test_answers_in_the_classes_of_the_dataset():
    assert align(np.array([[1.0, 0.0]]), ["old", "cat"], ["cat", "dog"]).tolist() == [[0, 0]]
    assert len(confident_mistakes(["a"], np.array([-1]), np.array([[0.9, 0.1]]), ["x", "y"])) == 0
