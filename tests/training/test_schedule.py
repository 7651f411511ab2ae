import pytest

from training.schedule import cosine_lr

PLAN = {"peak_lr": 2.0, "warmup_steps": 10, "total_steps": 110}


def test_rises_linearly_to_the_peak() -> None:
    assert [cosine_lr(step, **PLAN) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])


def test_falls_along_a_cosine_to_zero() -> None:
    assert cosine_lr(10, **PLAN) == pytest.approx(2.0)
    assert cosine_lr(60, **PLAN) == pytest.approx(1.0)
    assert cosine_lr(110, **PLAN) == pytest.approx(0.0)
    assert cosine_lr(1000, **PLAN) == pytest.approx(0.0)
