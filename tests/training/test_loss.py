"""The objectives equal the papers' own formulas, written down a second time in numpy and FP64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from training import loss as objectives
from training.loss import contrastive_loss, distillation_loss, sigmoid_loss

SCALE, BIAS = 14.3, -9.0


def unit(rows: int, seed: int, *, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


def softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    power = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return power / power.sum(axis=axis, keepdims=True)


def figure_3(image_features: np.ndarray, text_features: np.ndarray, t: float) -> float:
    """The pseudocode of the paper's figure 3, from the joint embeddings on."""
    n = len(image_features)
    logits = np.dot(image_features, text_features.T) * np.exp(t)
    labels = np.arange(n)
    loss_t = -np.log(softmax(logits, axis=0)[labels, labels]).mean()
    loss_i = -np.log(softmax(logits, axis=1)[labels, labels]).mean()
    return (loss_i + loss_t) / 2


def figure_3_gradients(
    image: np.ndarray, text: np.ndarray, t: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Its derivatives by hand: of a cross-entropy with respect to its logits, softmax - one-hot."""
    n = len(image)
    cosine = image @ text.T
    logits = cosine * np.exp(t)
    by_logits = (softmax(logits, 0) + softmax(logits, 1) - 2 * np.eye(n)) / (2 * n)
    by_cosine = by_logits * np.exp(t)
    return by_cosine @ text, by_cosine.T @ image, float((by_logits * logits).sum())


def algorithm_1(image: np.ndarray, text: np.ndarray, t: float, b: float) -> float:
    """The pseudocode of SigLIP's algorithm 1, from the normalised embeddings on."""
    n = len(image)
    logits = image @ text.T * t + b
    labels = 2 * np.eye(n) - np.ones((n, n))
    return -np.sum(-np.log1p(np.exp(-labels * logits))) / n


def central_difference(function, at: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = epsilon
        gradient[index] = (function(at + step) - function(at - step)) / (2 * epsilon)
    return gradient


def test_contrastive_loss_and_gradients_equal_figure_3_of_the_paper():
    image, text = unit(7, 0).requires_grad_(), unit(7, 1).requires_grad_()
    t = torch.tensor(np.log(SCALE), requires_grad=True)
    loss = contrastive_loss(image, text, t.exp())
    loss.backward()
    arrays = image.detach().numpy(), text.detach().numpy(), t.item()
    by_image, by_text, by_t = figure_3_gradients(*arrays)
    assert abs(loss.item() - figure_3(*arrays)) < 1e-6
    np.testing.assert_allclose(image.grad.numpy(), by_image, rtol=0, atol=1e-6)
    np.testing.assert_allclose(text.grad.numpy(), by_text, rtol=0, atol=1e-6)
    assert abs(t.grad.item() - by_t) < 1e-6
    assert np.abs(by_image).max() > 0.1, "nothing was compared"


def test_sigmoid_loss_and_gradients_equal_algorithm_1_of_the_paper():
    image, text = unit(6, 2).requires_grad_(), unit(6, 3).requires_grad_()
    scale, bias = (torch.tensor(x, requires_grad=True, dtype=torch.float64) for x in (SCALE, BIAS))
    loss = sigmoid_loss(image, text, scale, bias)
    loss.backward()
    x, y = image.detach().numpy(), text.detach().numpy()
    assert abs(loss.item() - algorithm_1(x, y, SCALE, BIAS)) < 1e-6
    for tensor, function, at in (
        (image, lambda v: algorithm_1(v, y, SCALE, BIAS), x),
        (text, lambda v: algorithm_1(x, v, SCALE, BIAS), y),
        (scale, lambda v: algorithm_1(x, y, v, BIAS), np.array(SCALE)),
        (bias, lambda v: algorithm_1(x, y, SCALE, v), np.array(BIAS)),
    ):
        expected = central_difference(function, at)
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=0, atol=1e-6)
        assert np.abs(expected).max() > 1e-2, "nothing was compared"


def test_distillation_equals_the_cross_entropy_between_rows_of_logits():
    student = (unit(5, 4), unit(5, 5), torch.tensor(SCALE))
    teacher = (unit(5, 6, width=12), unit(5, 7, width=12), torch.tensor(30.0))
    (x, y, _), (u, v, _) = ([t.numpy() for t in each] for each in (student, teacher))
    expected = 0.0
    for axis in (0, 1):
        target, found = softmax(u @ v.T * 30.0, axis), softmax(x @ y.T * SCALE, axis)
        expected -= (target * np.log(found)).sum(axis=axis).mean() / 2
    assert abs(distillation_loss(student, teacher).item() - expected) < 1e-6


def test_distillation_is_least_where_the_student_answers_as_the_teacher():
    image, text = unit(5, 4), unit(5, 5)
    teacher = (image.clone().requires_grad_(), text, torch.tensor(SCALE))
    student = (image.clone().requires_grad_(), text, torch.tensor(SCALE))
    distillation_loss(student, teacher).backward()
    assert student[0].grad.abs().max() < 1e-12
    assert teacher[0].grad is None
    other = (unit(5, 8), text, torch.tensor(SCALE))
    assert distillation_loss(other, teacher) > distillation_loss(student, teacher) + 0.1


def both(image: Tensor, text: Tensor, group: Tensor | None) -> list[Tensor]:
    scale, bias = torch.tensor(SCALE), torch.tensor(BIAS)
    return [
        contrastive_loss(image, text, scale, group_B=group),
        sigmoid_loss(image, text, scale, bias, group_B=group),
    ]


def test_pairs_of_one_group_are_not_negatives():
    image, text = unit(4, 2), unit(4, 3)
    group = torch.tensor([7, 7, 1, 2])
    logits = SCALE * image @ text.T
    masked = logits.clone()
    masked[0, 1] = masked[1, 0] = -torch.inf
    rows, columns = masked.log_softmax(1).diag(), masked.log_softmax(0).diag()
    contrastive = -(rows.mean() + columns.mean()) / 2
    signs = 2 * torch.eye(4) - 1
    asked = torch.nn.functional.logsigmoid(signs * (logits + BIAS))
    asked[0, 1] = asked[1, 0] = 0.0
    for found, expected in zip(
        both(image, text, group), (contrastive, -asked.sum() / 4), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_groups_that_do_not_repeat_change_nothing():
    image, text = unit(4, 2), unit(4, 3)
    assert both(image, text, torch.tensor([3, 1, 9, 2])) == both(image, text, None)


def test_gradient_is_finite_where_all_pairs_are_of_one_group():
    image = unit(4, 4).requires_grad_()
    for loss in both(image, unit(4, 5), torch.zeros(4, dtype=torch.int64)):
        (gradient,) = torch.autograd.grad(loss, image)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_some_rows_at_a_time_give_the_same_loss_and_gradient(monkeypatch, grouped):
    group = torch.tensor([0, 1, 0, 2, 3, 4, 4]) if grouped else None
    teacher = (unit(7, 10), unit(7, 11), torch.tensor(20.0))

    def losses_and_gradients() -> list[Tensor]:
        image, text = unit(7, 8).requires_grad_(), unit(7, 9).requires_grad_()
        distilled = distillation_loss((image, text, torch.tensor(SCALE)), teacher)
        losses = [*both(image, text, group), distilled]
        gradients = [torch.autograd.grad(loss, (image, text)) for loss in losses]
        return [*losses, *(gradient for pair in gradients for gradient in pair)]

    expected = losses_and_gradients()
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 3 * 7)
    for found, wanted in zip(losses_and_gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_many_rows_never_hold_all_logits_at_once(monkeypatch):
    monkeypatch.setattr(objectives, "LOGITS_AT_ONCE", 2**16)
    image, text = unit(1024, 12).requires_grad_(), unit(1024, 13)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    group = torch.arange(1024) // 2
    with Watch():
        for loss in both(image, text, group):
            loss.backward()
    assert largest == 2**16


def test_logits_are_fp32_under_autocast():
    image, text = unit(64, 14).float(), unit(64, 15).float()
    expected = both(image, text, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = both(image, text, None)
        coarse = torch.nn.functional.cross_entropy(SCALE * image @ text.T, torch.arange(64))
    assert found == expected
    assert coarse != torch.nn.functional.cross_entropy(SCALE * image @ text.T, torch.arange(64))
