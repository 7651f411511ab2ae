import torch
from torch import nn

from training.ema import WeightAverage


def test_the_average_follows_its_closed_form() -> None:
    model = nn.Linear(2, 1, bias=False)
    average = WeightAverage(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in (1000, 1001, 1002):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        expected = 0.5 * expected + 0.5 * model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)


def test_early_updates_move_faster() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, decay=0.999)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(0)
    torch.testing.assert_close(average.average["weight"], model.weight.detach() - 0.1)


def test_statistics_are_averaged_and_counters_are_not() -> None:
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, decay=0.9)
    model(torch.randn(8, 3))
    average.update(10_000)
    assert set(average.average) == {"weight", "bias", "running_mean", "running_var"}
    torch.testing.assert_close(average.average["running_mean"], 0.1 * model.running_mean)
