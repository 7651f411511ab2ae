"""A rehearsal of docs/rollout.md: real servers, a gateway, callers; nobody notices a rollout."""

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(540)]


def test_a_rollout_fails_no_call_mixes_no_versions_and_takes_none_that_is_wrong(tmp_path):
    from benchmarks.studies import rollout

    found, bars = rollout.rehearse(minutes=0, num_callers=6, folder=tmp_path)
    missed = [bar for bar in bars if not bar.is_met]
    assert not missed, (missed, found["failures"])
    assert found["num_cycles"] == 1
    assert found["num_calls"] > 100
    assert set(found["exit_codes_of_drains"]) == {0}
    assert found["longest_call_s"] < 30
