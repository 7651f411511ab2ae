import numpy as np
import torch

from training.loss import contrastive_loss


def unit(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 8, generator=generator), dim=-1)


def figure_3(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """The pseudocode of the paper's figure 3, in numpy and float64."""
    logits = scale * image @ text.T
    losses = []
    for axis in (1, 0):
        shifted = logits - logits.max(axis=axis, keepdims=True)
        log_probability = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
        losses.append(-np.diag(log_probability).mean())
    return sum(losses) / 2


def test_equals_figure_3_of_the_paper() -> None:
    image, text = unit(6, 0), unit(6, 1)
    loss = contrastive_loss(image, text, torch.tensor(14.3))
    expected = figure_3(image.double().numpy(), text.double().numpy(), 14.3)
    assert abs(loss.item() - expected) < 1e-5


def test_pairs_of_one_group_are_not_negatives() -> None:
    image, text = unit(4, 2), unit(4, 3)
    scale = torch.tensor(10.0)
    text[1] = text[0]  # two drawings of one name, so two equal captions
    plain = contrastive_loss(image, text, scale)
    grouped = contrastive_loss(image, text, scale, group_B=torch.tensor([0, 0, 1, 2]))
    assert grouped < plain
    alone = contrastive_loss(image, text, scale, group_B=torch.arange(4))
    torch.testing.assert_close(alone, plain)


def test_gradient_is_finite_with_groups() -> None:
    image = unit(4, 4).requires_grad_()
    contrastive_loss(image, unit(4, 5), torch.tensor(50.0), group_B=torch.zeros(4)).backward()
    assert torch.isfinite(image.grad).all()
