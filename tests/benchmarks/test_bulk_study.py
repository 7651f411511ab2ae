"""The study of bulk embedding, in small: it measures what it says, and its bars can be missed."""

from __future__ import annotations

import copy

import pytest

from benchmarks.studies import bulk

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return bulk.measure(bulk.BulkConfig().rehearsal(), tmp_path_factory.mktemp("study"))


def test_every_file_is_there_once_after_the_kills(found):
    kills = found["kills"]
    assert (kills["num_files"], kills["num_broken"], len(kills["kills"])) == (400, 1, 2)
    assert kills["num_missing"] == kills["num_repeated"] == 0
    assert kills["num_errors_not_named"] == kills["num_wrong_errors"] == 0
    assert 0 < kills["peak_rss_mib"] < bulk.MAX_RSS_MIB


def test_many_rows_go_on(found):
    many = found["many"]
    assert many["num_distinct"] == many["num_embedded"] == many["num_rows"] == 3000
    assert 0 < many["resume_to_next_partition_s"] < 60
    assert found["throughput"]["ratio"] > 0


def test_the_bars_can_be_missed(found):
    worse = copy.deepcopy(found)
    worse["kills"] |= {"num_missing": 1, "num_repeated": 2, "num_errors_not_named": 1}
    worse["kills"] |= {"num_wrong_errors": 1, "peak_rss_mib": 1100.0}
    worse["throughput"]["ratio"] = 0.85
    worse["many"] |= {"num_distinct": 2999, "num_embedded": 3001, "peak_rss_mib": 1100.0}
    worse["many"] |= {"growth_mib": 70.0, "resume_to_next_partition_s": 11.0}
    assert not any(bar.is_met for bar in bulk.find_bars(worse))


def test_the_files_differ_and_some_are_broken(tmp_path):
    broken = bulk.write_files(tmp_path, 600)
    contents = {path.read_bytes() for path in tmp_path.rglob("*.jpg")}
    assert (len(contents), len(broken)) == (600, 1)
