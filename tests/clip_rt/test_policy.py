"""Policies: what is read comes back as it was, and what is none is refused by its field."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_rt.errors import PolicyError
from clip_rt.moderation.policy import (
    MAX_BYTES,
    MAX_LABELS,
    Calibration,
    CalibrationError,
    Data,
    Interval,
    Label,
    Measured,
    Policy,
    Target,
    find_policy,
    list_starters,
)

FITTED = Policy(
    name="weapons",
    labels=(
        Label(
            name="firearm",
            prompts=("gun", "pistol"),
            action="block",
            review_threshold=0.5,
            block_threshold=0.9,
            target=Target(measure="precision", value=0.95),
            calibration=Calibration(slope=31.5, intercept=-9.25),
            measured=Measured(
                num_images=1000,
                num_true=120,
                num_flagged=100,
                precision=Interval(value=0.99, low=0.95, high=1.0),
                recall=Interval(value=0.8, low=0.72, high=0.87),
                is_target_met=True,
            ),
        ),
        Label(
            name="Messer, 刀",
            calibration=Calibration(slope=20.0, intercept=-4.0),
            measured=Measured(
                num_images=1000, num_true=3, num_flagged=0, shortfall="3 images; it takes 99"
            ),
        ),
    ),
    templates=("a photo of a {}.",),
    model="drawings",
    fingerprint="ad7d",
    data=Data(sha256="0" * 64, size_bytes=123_456, num_images=1000),
    calibration_error=CalibrationError(before=0.2, after=0.03),
    date="2026-11-29",
)
SOFTMAX = Policy(
    name="kinds",
    kind="softmax",
    labels=(Label(name="cat", bias=-0.5), Label(name="other", action="allow")),
    temperature=1.7,
    none_of_these=True,
    none_bias=2.25,
    model="drawings",
    fingerprint="ad7d",
)
DELETED = object()


def damaged(place: str, value: object, policy: Policy = FITTED) -> str:
    """The JSON of a policy with another value at a place such as `labels.0.name`."""
    document = json.loads(policy.to_json())
    *path, last = [int(each) if each.isdigit() else each for each in place.split(".")]
    inner = document
    for each in path:
        inner = inner[each]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(document)


class TestFiles:
    @pytest.mark.parametrize("policy", [FITTED, SOFTMAX], ids=lambda policy: policy.kind)
    def test_come_back_as_they_were(self, policy, tmp_path):
        path = tmp_path / "policy.json"
        policy.save(path)
        assert Policy.load(path) == policy
        assert Policy.from_json(policy.to_json()) == policy
        assert os.listdir(tmp_path) == ["policy.json"]
        assert json.loads(path.read_text("utf-8"))["format"] == 1

    def test_are_replaced_whole_or_not_at_all(self, tmp_path):
        path = tmp_path / "policy.json"
        FITTED.save(path)
        SOFTMAX.save(path)
        assert Policy.load(path) == SOFTMAX
        with pytest.raises(PolicyError, match=r"cannot be written.*folder"):
            FITTED.save(tmp_path / "missing" / "policy.json")
        assert os.listdir(tmp_path) == ["policy.json"]

    def test_need_little_to_be_written_by_hand(self):
        policy = Policy.from_json('{"format": 1, "name": "mine", "labels": [{"name": "cat"}]}')
        assert policy.labels[0].prompts == ("cat",)
        assert policy.kind == "independent"
        assert not policy.is_calibrated

    def test_of_the_page_can_be_read(self):
        text = (Path(__file__).resolve().parents[2] / "docs/moderation.md").read_text("utf-8")
        policy = Policy.from_json(re.search(r"^```\n(\{.*?)^```", text, re.DOTALL | re.M)[1])
        assert [label.name for label in policy.labels] == ["shoe", "hat"]

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.builds(
            Label,
            name=st.text(min_size=1, max_size=30).filter(str.strip),
            prompts=st.lists(st.text(min_size=1).filter(str.strip), max_size=3).map(tuple),
            action=st.sampled_from(["review", "block"]),
            review_threshold=st.none() | st.floats(0, 1),
            calibration=st.none()
            | st.builds(Calibration, slope=st.floats(-1e6, 1e6), intercept=st.floats(-1e6, 1e6)),
        )
    )
    def test_hold_any_text_and_any_number(self, label):
        policy = replace(FITTED, labels=(label,))
        assert Policy.from_json(policy.to_json().encode()) == policy

    def test_that_are_too_large_are_not_read(self, tmp_path):
        path = tmp_path / "policy.json"
        path.write_text(FITTED.to_json() + " " * MAX_BYTES)
        with pytest.raises(PolicyError, match=r"more than the 16,777,216 bytes"):
            Policy.load(path)

    def test_that_are_not_there_are_named(self, tmp_path):
        with pytest.raises(PolicyError, match=r"nowhere\.json.*No such file"):
            Policy.load(tmp_path / "nowhere.json")
        (tmp_path / "bad.json").write_text(damaged("labels.0.action", "shout"))
        with pytest.raises(PolicyError, match=r"policy '.*': labels\[0\]\.action") as caught:
            Policy.load(tmp_path / "bad.json")
        assert caught.value.field == "labels[0].action"


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"", "no JSON"),
            (b"\xff\xfe\x00", "no JSON"),
            (b"[" * 100_000, "no JSON"),
            (b"[]", "a list; it must be an object"),
            (b"1" * 5000, "no JSON"),
            (b'{"format": 1, "format": 1}', "'format' is there twice"),
            (b'{"name": NaN}', "NaN is no number of JSON"),
            (b"{}", "format is None; this version reads 1"),
            (b'{"format": true}', "format is True"),
            (b'{"format": 2}', "format is 2; this version reads 1. Take the version"),
            (b'{"format": 1}', "name is missing"),
            (b"__import__('os').system('true')", "no JSON"),
        ],
    )
    def test_that_are_no_policy_are_refused(self, text, said):
        with pytest.raises(PolicyError) as caught:
            Policy.from_json(text)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "value", "field"),
        [
            ("name", 7, "name"),
            ("name", " ", "name"),
            ("name", "x" * 1001, "name"),
            ("name", DELETED, "name"),
            ("name", "half \ud800", "name"),
            ("nmae", "x", "nmae"),
            ("kind", "both", "kind"),
            ("kind", ["softmax"], "kind"),
            ("kind", "softmax", "labels[0].calibration"),
            ("labels", [], "labels"),
            ("labels", {}, "labels"),
            ("labels", [{"name": f"n{i}"} for i in range(MAX_LABELS + 1)], "labels"),
            ("labels.1", None, "labels[1]"),
            ("labels.1", "cat", "labels[1]"),
            ("labels.1.name", "firearm", "labels[1].name"),
            ("labels.1.name", DELETED, "labels[1].name"),
            ("labels.1.colour", "red", "labels[1].colour"),
            ("labels.0.prompts", "gun", "labels[0].prompts"),
            ("labels.0.prompts", ["gun", ""], "labels[0].prompts[1]"),
            ("labels.0.prompts", ["gun", 1], "labels[0].prompts[1]"),
            ("labels.0.prompts", ["gun"] * 201, "labels[0].prompts"),
            ("labels.0.action", "delete", "labels[0].action"),
            ("labels.0.action", "review", "labels[0].block_threshold"),
            ("labels.0.review_threshold", -0.1, "labels[0].review_threshold"),
            ("labels.0.review_threshold", 0.95, "labels[0].review_threshold"),
            ("labels.0.review_threshold", "0.5", "labels[0].review_threshold"),
            ("labels.0.review_threshold", True, "labels[0].review_threshold"),
            ("labels.0.target.value", 1, "labels[0].target.value"),
            ("labels.0.target.measure", "f1", "labels[0].target.measure"),
            ("labels.0.calibration.slope", 1e300, "labels[0].calibration.slope"),
            ("labels.0.calibration.intercept", None, "labels[0].calibration.intercept"),
            ("labels.0.measured.num_true", 1.0, "labels[0].measured.num_true"),
            ("labels.0.measured.num_true", 1001, "labels[0].measured.num_true"),
            ("labels.0.measured.precision.low", 0.995, "labels[0].measured.precision.value"),
            ("templates", ["no slot"], "templates"),
            ("templates", ["{} and {}"], "templates"),
            ("templates", [], "templates"),
            ("temperature", 1.5, "temperature"),
            ("none_of_these", True, "none_of_these"),
            ("none_of_these", 1, "none_of_these"),
            ("none_bias", 0.5, "none_bias"),
            ("labels.1.bias", 0.5, "labels[1].bias"),
            ("labels.1.bias", None, "labels[1].bias"),
            ("model", None, "fingerprint"),
            ("fingerprint", None, "fingerprint"),
            ("data.sha256", "0" * 63, "data.sha256"),
            ("data.size_bytes", -1, "data.size_bytes"),
            ("date", "29.11.2026", "date"),
            ("calibration_error.after", 2, "calibration_error.after"),
        ],
    )
    def test_are_refused_by_the_field(self, place, value, field):
        with pytest.raises(PolicyError) as caught:
            Policy.from_json(damaged(place, value))
        assert caught.value.field == field
        assert field.split("[")[0] in str(caught.value)
        assert len(str(caught.value)) < 400

    @pytest.mark.parametrize(
        ("place", "value", "field"),
        [
            ("temperature", 0, "temperature"),
            ("temperature", -1.0, "temperature"),
            ("labels.0.name", "none of these", "labels[0].name"),
            ("labels.1.review_threshold", 0.5, "labels[1].review_threshold"),
        ],
    )
    def test_of_a_softmax_are_refused_too(self, place, value, field):
        with pytest.raises(PolicyError) as caught:
            Policy.from_json(damaged(place, value, SOFTMAX))
        assert caught.value.field == field

    def test_of_endless_numbers_are_refused(self):
        text = FITTED.to_json().replace("31.5", "1e999")
        with pytest.raises(PolicyError, match=r"labels\[0\]\.calibration\.slope is Infinity"):
            Policy.from_json(text)

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def test_raise_nothing_else(self, data):
        document = json.loads(FITTED.to_json())
        inner: object = document
        while isinstance(inner, (dict, list)) and inner:
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(inner[key], (dict, list)) or data.draw(st.booleans()):
                inner[key] = data.draw(
                    st.recursive(
                        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                        max_leaves=4,
                    )
                )
                break
            inner = inner[key]
        before = copy.deepcopy(document)
        try:
            policy = Policy.from_json(json.dumps(document))
        except PolicyError:
            return
        assert json.loads(policy.to_json()).keys() == before.keys()


class TestLabels:
    def test_decide_by_the_highest_threshold_that_is_reached(self):
        label = FITTED.labels[0]
        assert label.decide(0.9) == ("block", 0.9)
        assert label.decide(0.89) == ("review", 0.5)
        assert label.decide(0.49) == ("allow", None)
        assert Label(name="cat").decide(1.0) == ("allow", None)

    def test_make_a_policy_calibrated_when_all_of_them_are(self):
        assert FITTED.is_calibrated
        assert SOFTMAX.is_calibrated
        first, second = FITTED.labels
        bare = replace(second, calibration=None)
        assert not replace(FITTED, labels=(first, bare)).is_calibrated
        assert replace(FITTED, labels=(first, replace(bare, action="allow"))).is_calibrated
        assert not replace(FITTED, model=None, fingerprint=None).is_calibrated
        assert not replace(SOFTMAX, temperature=None).is_calibrated

    def test_say_what_was_not_promised(self):
        assert FITTED.shortfalls == {"Messer, 刀": "3 images; it takes 99"}


class TestStarters:
    def test_are_these(self):
        assert set(list_starters()) == {
            *("medical", "people-present", "safe-for-work", "screenshots", "text-in-image"),
            *("violence", "weapons"),
        }

    @pytest.mark.parametrize("name", list_starters())
    def test_promise_nothing_and_block_nothing(self, name):
        policy = find_policy(name)
        assert policy.name == name
        assert not policy.is_calibrated
        assert policy.fingerprint is policy.data is policy.date is None
        for label in policy.labels:
            assert label.calibration is label.measured is label.block_threshold is None
            assert label.review_threshold == 0.5

    def test_are_told_from_files_by_their_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        FITTED.save(Path("weapons.json"))
        assert find_policy("weapons.json") == FITTED
        assert not find_policy("weapons").is_calibrated
        with pytest.raises(PolicyError, match=r"'wepons'.*one of medical, .*weapons"):
            find_policy("wepons")
