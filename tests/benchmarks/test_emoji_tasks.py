"""What the few-shot and robustness measurements are made of."""

import math

import numpy as np
import pytest

from benchmarks.studies import emoji, robustness


def test_kinds_are_the_ranges_of_the_table_and_do_not_overlap() -> None:
    labels, kinds = emoji.kind_by_hexcode()
    counts = np.bincount(list(kinds.values()))
    rows = emoji.json.loads(emoji._TABLE.read_text())["subgroups"]
    assert len(labels) == len(set(labels)) == 30
    # A range that ran into its neighbour's would take emoji from it.
    assert counts.tolist() == [row["count"] for row in rows]
    names = {"1F435": "mammal", "2B06": "arrow", "1F528": "tool", "1F347": "fruit"}
    assert {code: labels[kinds[code]] for code in names} == names
    assert "1F600" not in kinds  # its subgroup has 14 members


def test_drawings_without_a_kind_are_left_out() -> None:
    drawings, right_N = emoji.with_kinds(emoji.load_style("openmoji-black"))
    _, kinds = emoji.kind_by_hexcode()
    assert len(drawings) == len(right_N) == len(kinds) == 1252
    for row in (0, 500, 1251):
        assert kinds[drawings.records[row]["emoji"]] == right_N[row]


def test_the_expected_accuracy_is_the_line_on_logit_axes() -> None:
    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    points = [(logistic(x), logistic(0.5 * x - 1)) for x in (-2.0, -1.0, 0.5)]
    expected = robustness.expect(points)
    for x in (-3.0, 0.0, 2.0):
        assert expected(logistic(x)) == pytest.approx(logistic(0.5 * x - 1))


def test_effective_robustness_is_the_gain_over_the_line() -> None:
    def scores(reference: float, other: float) -> dict[str, float]:
        styles = dict.fromkeys((*robustness.SEEN_STYLES, *robustness.HELD_OUT_STYLES), other)
        return {robustness.REFERENCE: reference, **styles}

    # The line is the diagonal: what is right on Noto is right elsewhere.
    line = [scores(0.2, 0.2), scores(0.5, 0.5), scores(0.7, 0.7)]
    rows = robustness.summarise({"robust": scores(0.4, 0.6), "brittle": scores(0.6, 0.3)}, line)
    for group in robustness.GROUPS:
        assert rows["robust"][f"effective_robustness_{group}"] == pytest.approx(0.2)
        assert rows["brittle"][f"effective_robustness_{group}"] == pytest.approx(-0.3)
        assert rows["brittle"][group] == pytest.approx(0.3)
