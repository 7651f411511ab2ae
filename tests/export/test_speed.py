"""What an export says of INT8's speed here, by given figures and by a real measurement."""

from __future__ import annotations

import pytest

from clip_rt import processor
from clip_rt.processor import Processor
from export import int8, probes, speed
from export.pipeline import Towers
from export.speed import Comparison

ZEN4 = Processor("AMD EPYC", ("avx2", "avx512f", "avx512_bf16", "avx512_vnni"))
HASWELL = Processor("Intel(R) Xeon(R) CPU E5-2680 v4", ("avx2",))
CAPPED = Processor("AMD EPYC", ZEN4.flags, caps=(("ONEDNN_MAX_CPU_ISA", "AVX2"),))

SLOWER = (
    "INT8 is slower than FP32 on this processor, which has no AVX-512, VNNI or AMX: images "
    "take 1.15 times as long, texts take 1.11 times as long; it may be faster where you serve. "
    "--precision fp32"
)
FASTER = (
    "INT8 is faster than FP32 here (AVX-512, VNNI, BF16): images are 3.4 times as fast, "
    "texts are 2.6 times as fast"
)
MIXED = (
    "INT8 is slower than FP32 on this processor: images take 1.11 times as long, texts are "
    "2.0 times as fast; it may be faster where you serve."
)


@pytest.mark.parametrize(
    ("image", "text", "found", "words"),
    [
        (
            3.4, 2.6, ZEN4,
            FASTER,
        ),
        (
            0.87, 0.9, HASWELL,
            SLOWER,
        ),
        (
            1.2, 0.9, CAPPED,
            "which may use no AVX-512, VNNI or AMX (ONEDNN_MAX_CPU_ISA=AVX2): images are 1.2",
        ),
        (0.9, 2.0, ZEN4, MIXED),
        (1.3, 1.1, HASWELL, "INT8 is faster than FP32 here (AVX2): images are 1.3 times"),
    ],
)  # fmt: skip
def test_one_line_says_which_is_faster_here(image, text, found, words) -> None:
    assert words in Comparison(image, text).in_words(found)


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ({"onnxruntime": 0.06, "openvino": 0.08, "int8": 0.02}, 3.0),
        ({"onnxruntime": 0.08, "openvino": 0.06, "int8": 0.02}, 3.0),
        ({"onnxruntime": 0.06, "openvino": 0.06, "int8": 0.12}, 0.5),
    ],
)
def test_int8_is_held_against_the_faster_runtime(monkeypatch, times_s, expected) -> None:
    monkeypatch.setattr(speed, "time_by_turns", lambda ways: {name: times_s[name] for name in ways})
    encoders = dict.fromkeys(times_s, lambda batch: batch)
    assert speed._speed(encoders, probes.images(32)[:1]) == pytest.approx(expected)


def test_both_precisions_of_a_real_model_are_timed(exported_vit, tmp_path, monkeypatch) -> None:
    spec = exported_vit.clip.spec
    files = {tower: tmp_path / tower / "model.xml" for tower in ("image", "text")}
    for tower, rows in (
        ("image", probes.images(spec.side_px)),
        ("text", probes.tokens(spec.text.context_length)),
    ):
        files[tower].parent.mkdir()
        int8.write_int8(getattr(exported_vit, tower), [row[None] for row in rows], files[tower])
    timed: list[dict[str, float]] = []

    def time_by_turns(ways):
        timed.append(runtime_times(ways, budget_s=0.2))
        return dict(timed[-1])

    runtime_times = speed.time_by_turns
    monkeypatch.setattr(speed, "time_by_turns", time_by_turns)
    fp32 = Towers(exported_vit.image, exported_vit.text)
    found = speed.compare(fp32, Towers(files["image"], files["text"]), exported_vit.clip)
    assert [sorted(each) for each in timed] == 2 * [["int8", "onnxruntime", "openvino"]]
    for ratio, times_s in zip((found.image, found.text), timed, strict=True):
        assert ratio == min(times_s["onnxruntime"], times_s["openvino"]) / times_s["int8"]
    assert "INT8 is " in found.in_words(processor.read())
