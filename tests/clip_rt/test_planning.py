"""Sizing: the queue's estimate against the queue played out, and the choice that comes of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from asking import ROOT, ask
from hypothesis import given, settings
from hypothesis import strategies as st

import clip_rt
from clip_rt.planning.hardware import DEVICES
from clip_rt.planning.plan import Load, batch_seconds, rank, weigh
from clip_rt.planning.queueing import capacity_per_s, estimate, simulate
from clip_rt.planning.work import flop_per_image
from clip_rt.specs import MODELS

LINEAR = tuple(0.005 + 0.001 * size for size in range(1, 33))
"""A GPU: batches pay."""
PROCESSOR = tuple(0.002 + 0.012 * size for size in range(1, 17))
"""Batches hardly pay."""
ONE = (0.01,)
L14 = MODELS["ViT-L/14"]


class TestQueue:
    @pytest.mark.parametrize("batch_s", [LINEAR, PROCESSOR, ONE], ids=["gpu", "cpu", "one"])
    @pytest.mark.parametrize("load", [0.05, 0.3, 0.6, 0.8, 0.9])
    def test_the_estimate_is_what_the_simulation_finds(self, batch_s, load):
        rate = load * capacity_per_s(batch_s)
        found = estimate(rate, batch_s)
        played = simulate(rate, batch_s, num_items=100_000, seed=1)
        assert found.p50_s == pytest.approx(np.quantile(played, 0.5), rel=0.05)
        assert found.p99_s == pytest.approx(np.quantile(played, 0.99), rel=0.1)

    def test_one_at_a_time_it_is_the_queue_of_the_books(self):
        # M/D/1: the mean number that a departure leaves is u + u^2 / (2 (1 - u)).
        for load in (0.2, 0.5, 0.7):
            played = simulate(load / ONE[0], ONE, num_items=100_000, seed=2)
            waiting_s = ONE[0] * load / (2 * (1 - load))
            assert played.mean() == pytest.approx(ONE[0] + waiting_s, rel=0.02)
            assert estimate(load / ONE[0], ONE).busy == pytest.approx(load, rel=1e-3)

    def test_of_a_light_load_each_item_is_alone(self):
        found = estimate(1e-3, LINEAR)
        assert found.p50_s == pytest.approx(LINEAR[0])
        assert found.p99_s == pytest.approx(LINEAR[0])
        assert found.mean_batch == pytest.approx(1, abs=1e-3)

    def test_beyond_the_capacity_there_is_no_latency(self):
        assert estimate(1.01 * capacity_per_s(LINEAR), LINEAR).p99_s == math.inf

    @settings(max_examples=30, deadline=None)
    @given(
        fixed_ms=st.floats(0.1, 10),
        item_ms=st.floats(0.05, 10),
        largest=st.integers(1, 32),
        load=st.floats(0.05, 0.8),
    )
    def test_more_load_is_never_quicker(self, fixed_ms, item_ms, largest, load):
        batch_s = [(fixed_ms + item_ms * size) / 1e3 for size in range(1, largest + 1)]
        capacity = capacity_per_s(batch_s)
        light, heavy = (estimate(each * capacity, batch_s) for each in (load, load + 0.1))
        assert batch_s[0] <= light.p50_s <= light.p99_s
        # Equal latencies are bins apart where the moments of an arrival are.
        assert heavy.p99_s >= 0.97 * light.p99_s
        assert 0 < light.busy < heavy.busy <= 1


class TestChoice:
    def test_the_rate_within_the_latency_keeps_it(self):
        load = Load(rate_per_s=2000, p99_s=0.05)
        for option in rank(L14, load, DEVICES.values()):
            if option.latency is None:
                continue
            assert option.latency.p99_s <= load.p99_s
            assert option.num_needed * option.rate_per_s >= load.rate_per_s * 0.999
            assert option.num_rented == option.num_needed + 1
            # One fewer does not.
            fewer = option.num_needed - 1
            assert fewer == 0 or fewer * option.rate_per_s < load.rate_per_s
            played = simulate(load.rate_per_s / option.num_needed, option.batch_s, seed=3)
            assert np.quantile(played, 0.99) <= 1.05 * load.p99_s

    def test_the_cheapest_is_first(self):
        options = rank(L14, Load(rate_per_s=500, p99_s=0.1), DEVICES.values())
        costs = [each.usd_per_hour for each in options]
        assert costs == sorted(costs)
        assert math.isfinite(costs[0])

    def test_what_is_too_slow_says_so(self):
        option = weigh(MODELS["ViT-H/14"], Load(rate_per_s=10, p99_s=0.02), DEVICES["16 cores"])
        assert option.num_needed == 0
        assert "one item alone takes" in option.reason

    def test_what_is_quick_enough_only_when_idle_says_so(self):
        option = weigh(L14, Load(rate_per_s=10, p99_s=0.08), DEVICES["16 cores, INT8"])
        assert option.num_needed == 0
        assert "5% of its capacity" in option.reason

    def test_what_has_no_room_says_so(self):
        small = dataclasses.replace(DEVICES["L4"], memory_bytes=1e9)
        option = weigh(MODELS["ViT-H/14"], Load(rate_per_s=10, p99_s=1), small)
        assert option.num_needed == 0
        assert "memory" in option.reason

    def test_speeds_are_what_the_published_figures_say(self):
        """ViT-L/14 on an RTX 6000 Ada, TensorRT, batch 128: 770 images a second."""
        ada = dataclasses.replace(
            DEVICES["L40S"], flop_per_s=DEVICES["L40S"].flop_per_s * 364.25 / 362
        )
        load = Load(rate_per_s=1, p99_s=1, max_batch=128)
        assert 128 / batch_seconds(L14, load, ada)[-1] == pytest.approx(770, rel=0.1)
        assert flop_per_image(L14, is_pruned=False) == pytest.approx(162.03e9, rel=0.01)

    @pytest.mark.parametrize(
        "wrong",
        [{"rate_per_s": 0}, {"p99_s": math.inf}, {"max_batch": 0}, {"spares": -1}],
        ids=str,
    )
    def test_a_load_that_is_none_is_refused(self, wrong):
        with pytest.raises(clip_rt.InputError):
            Load(**{"rate_per_s": 1.0, "p99_s": 1.0} | wrong)


class TestCommand:
    def test_it_prints_the_choice_and_why(self, capfd):
        done = ask(capfd, "plan", "--model", "ViT-L/14", "--rate", 2000, "--p99-ms", 50)
        assert done.status == 0
        best = done.rows[0]
        assert best["num_needed"] >= 1
        assert best["p99_ms"] <= 50
        assert {row["device"] for row in done.rows} == set(DEVICES)
        assert all(row["reason"] for row in done.rows)

    def test_prices_and_measurements_of_ones_own(self, capfd):
        done = ask(
            capfd, "plan", "--rate", 400, "--device", "L4", "--price", "L4=0.5", "--spares", 0,
            "--batch-ms", "1=4", "8=16", "32=50",
        )  # fmt: skip
        (row,) = done.rows
        assert row["basis"] == "measured"
        assert row["capacity_per_s"] == pytest.approx(640)
        assert row["usd_per_hour"] == pytest.approx(0.5 * row["num_rented"])

    def test_nothing_may_do(self, capfd):
        done = ask(capfd, "plan", "--model", "ViT-bigG/14", "--rate", 5, "--p99-ms", 3)
        assert done.status == 1

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            (("--device", "L5"), "L40S"),
            (("--price", "L4=cheap"), "L4=cheap"),
            (("--batch-ms", "1=2"), "--device"),
            (("--device", "L4", "--batch-ms", "2=2"), "1 among them"),
            (("--model", "ViT-L/15"), "ViT-L/14"),
            (("--max-batch", "0"), "max batch"),
        ],
    )
    def test_wrong_options_are_refused(self, capfd, wrong, named):
        done = ask(capfd, "plan", "--rate", 1, *wrong)
        assert done.status == 2
        assert named in done.err


class TestPage:
    """docs/sizing.md has a table of throughput and cost."""

    PAGE = ROOT / "docs/sizing.md"
    MODELS = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
    BUSY = 0.7

    def test_its_table_is_what_is_computed(self):
        text = self.PAGE.read_text("utf-8")
        assert self.table() in text, f"docs/sizing.md has another table than\n{self.table()}"

    def table(self) -> str:
        load = Load(rate_per_s=1, p99_s=1)
        lines = [
            "| device | rented as | $/hour | " + " | ".join(self.MODELS) + " |",
            "|---" * (3 + len(self.MODELS)) + "|",
        ]
        for device in DEVICES.values():
            cells = [device.name, device.instance, f"{device.usd_per_hour:.2f}"]
            for name in self.MODELS:
                rate = capacity_per_s(batch_seconds(MODELS[name], load, device))
                usd = device.usd_per_hour / (self.BUSY * rate) * 1e6 / 3600
                cells.append(f"{float(f'{rate:.2g}'):,.0f}/s, ${float(f'{usd:.2g}'):g}")
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)
