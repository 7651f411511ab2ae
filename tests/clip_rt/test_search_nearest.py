"""The nearest rows: exact where there are few, and from codes where there are many."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from clip_rt.search import codes, nearest
from clip_rt.search.nearest import Nearest, best

faiss = pytest.importorskip("faiss")
DIM, NUM = 64, 6000


@pytest.fixture
def rows(monkeypatch):
    """Rows without structure, more than are scanned exactly here, in several files of codes."""
    monkeypatch.setattr(nearest, "EXACT_ROWS", 2000)
    monkeypatch.setattr(codes, "SHARD_ROWS", 2500)
    rows = np.random.default_rng(0).standard_normal((NUM, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_codes(folder, rows, generation=1):
    made = codes.Codes(folder, generation)
    made.extend(rows)
    made.close()


def nearest_ten(found: Nearest, query) -> list[int]:
    chosen, scores = found.rank(query)
    return chosen[best(scores, 10)].tolist()


def recall(found: Nearest, rows, num_queries=50) -> float:
    queries = np.random.default_rng(1).standard_normal((num_queries, DIM)).astype(np.float32)
    shares = []
    for query in queries:
        truth = best(rows @ query, 10).tolist()
        shares.append(len(set(truth) & set(nearest_ten(found, query))) / 10)
    return float(np.mean(shares))


def test_few_rows_are_all_compared(tmp_path, rows):
    found = Nearest(tmp_path, 1, rows[:2000])
    assert found.is_exact
    assert recall(found, rows[:2000]) == 1


def test_rows_without_structure_are_found_by_their_codes(tmp_path, rows):
    make_codes(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "codes-1-0.faiss",
        "codes-1-1.faiss",
        "codes-1-2.faiss",
    ]
    found = Nearest(tmp_path, 1, rows)
    assert not found.is_exact
    chosen, _ = found.rank(rows[0])
    assert len(chosen) < NUM
    assert recall(found, rows) >= 0.95
    found.close()


def test_scores_are_exact_whatever_the_codes(tmp_path, rows):
    make_codes(tmp_path, rows)
    found = Nearest(tmp_path, 1, rows)
    chosen, scores = found.rank(rows[7])
    np.testing.assert_allclose(scores, rows[chosen] @ rows[7], atol=1e-6)
    assert chosen[best(scores, 1)].tolist() == [7]
    found.close()


def test_rows_without_a_code_are_compared_too(tmp_path, rows):
    make_codes(tmp_path, rows[:5900])
    found = Nearest(tmp_path, 1, rows)
    for row in (5899, 5900, NUM - 1):
        assert nearest_ten(found, rows[row])[0] == row
    found.close()


def test_adding_writes_the_last_file_only(tmp_path, rows):
    make_codes(tmp_path, rows[:5500])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_codes(tmp_path, rows)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"codes-1-2.faiss"}


def test_files_that_are_damaged_cost_time_and_nothing_else(tmp_path, rows, caplog):
    make_codes(tmp_path, rows)
    (tmp_path / "codes-1-1.faiss").write_bytes(b"IxPQ" + b"\0" * 100)
    with caplog.at_level(logging.WARNING, "clip_rt.search"):
        found = Nearest(tmp_path, 1, rows)
    assert "codes-1-1.faiss is damaged" in caplog.text
    assert nearest_ten(found, rows[3000])[0] == 3000
    found.close()
    make_codes(tmp_path, rows)
    again = codes.Codes(tmp_path, 1)
    again.load(NUM)
    assert again.num_rows == NUM
    again.close()


def test_without_faiss_all_are_compared_and_it_is_said(tmp_path, rows, caplog, monkeypatch):
    monkeypatch.setattr(codes, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, "clip_rt.search"):
        found = Nearest(tmp_path, 1, rows)
    assert "clip-rt[search]" in caplog.text
    assert found.is_exact
    assert recall(found, rows, 5) == 1


def test_the_best_of_equal_ones_are_the_first():
    scores = np.array([0.5, 1, 0.5, 1, 0.5], np.float32)
    assert best(scores, 3).tolist() == [1, 3, 0]
    assert best(scores, 9).tolist() == [1, 3, 0, 2, 4]
    assert best(scores[:0], 3).tolist() == []
