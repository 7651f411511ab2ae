"""The page that says which models were exported, and what it is written from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.studies import encoders, encoders_page

MACHINE = {"cpu": "Some CPU", "usable_cores": 2, "cpu_flags": ["avx512f", "avx512_vnni"]}
RESULTS = Path(encoders.ROOT) / "benchmarks/results"


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("ViT-B-16-SigLIP2", "SigLIP 2"),
        ("ViT-SO400M-14-SigLIP", "SigLIP"),
        ("nllb-clip-large-siglip", "NLLB-CLIP"),
        ("ViT-H-14-worldwide-378", "MetaCLIP 2"),
        ("ViT-L-14-CLIPA-336", "CLIPA"),
        ("EVA02-B-16", "EVA"),
        ("coca_roberta-ViT-B-32", "CoCa"),
        ("xlm-roberta-base-ViT-B-32", "CLIP with text towers of others"),
        ("convnext_base_w", "CLIP with ConvNeXt"),
        ("RN50-quickgelu", "CLIP"),
        ("ViT-B-32", "CLIP"),
    ],
)
def test_a_configuration_belongs_to_who_published_its_weights(model, family):
    assert encoders_page.find_family(model).name == family


def test_the_page_in_docs_is_that_of_the_newest_result():
    result = json.loads(encoders_page.newest(RESULTS).read_text("utf-8"))
    assert encoders_page.PAGE.read_text("utf-8") == encoders_page.render(result), (
        "python -m benchmarks.studies.encoders --render benchmarks/results"
    )


def test_what_was_refused_or_failed_is_said():
    gate = {"passed": True, "image": 1 - 2e-7, "text": 1.0}
    facts = {"side_px": 224, "context_length": 77, "any_length": True, "parameters": 2e8}
    facts |= {"tokenizer": "openai", "fp32": gate}
    page = encoders_page.render(
        {
            "date": "2026-11-28",
            "num_known": 3,
            "machine": MACHINE,
            "models": {
                "coca_ViT-B-32": facts | {"failed": "ended by SIGSEGV"},
                "EVA02-B-16": facts | {"fp16": gate | {"passed": False, "text": 0.99}},
                "ViT-e-14": {"left_out": "4.6 billion parameters"},
            },
        }
    )
    assert "2 of open_clip's 3 configurations" in page
    assert "| 1 - 2e-07 | ended by SIGSEGV |" in page
    assert "| 1 - 2e-07 | refused: 1 - 1e-02 |" in page
    assert page.endswith("Not exported:\n\n- `ViT-e-14`: 4.6 billion parameters\n")


def test_what_a_process_printed_before_it_ended_is_kept():
    printed = 'noise\n{"fp32": 1}\n{"fp32": 1, "fp16": 2}\n'
    assert encoders._last(printed) == {"fp32": 1, "fp16": 2}
    assert encoders._last("noise\n") == {}


@pytest.mark.torch
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, open_clip):
    out = tmp_path / "2026-01-01_encoders.json"
    times = {"times_yardstick": {"image": 1.0, "text": 1.0}}
    kept = {"ViT-S-32-alt": {"fp16": "kept"} | times, "ViT-B-32": {"left_out": "for a reason"}}
    out.write_text(json.dumps({"models": kept | {"ViT-M-32": {"fp16": "kept"}}}))
    asked = []

    def measure(name, yardstick, *, only_time):
        asked.append((name, only_time))
        return times

    monkeypatch.setattr(encoders, "write_yardstick", lambda folder: None)
    monkeypatch.setattr(encoders, "_measure_apart", measure)
    monkeypatch.setattr(encoders, "_row", lambda name, found: (name, 0, 0, "", "", 0))
    names = ("ViT-S-32-alt", "ViT-M-32", "ViT-B-32", "ViT-S-16-alt")
    encoders.main(encoders.EncodersConfig(model=names, out=out))
    # Small ones first.
    assert asked == [("ViT-S-16-alt", False), ("ViT-M-32", True)]
    expected = kept | {"ViT-M-32": {"fp16": "kept"} | times, "ViT-S-16-alt": times}
    assert json.loads(out.read_text())["models"] == expected


def test_a_page_of_a_result_says_how_long_each_takes():
    gate = {"passed": True, "image": 1 - 2e-7, "text": 1.0}
    facts = {"side_px": 224, "context_length": 77, "any_length": True, "parameters": 2e8}
    facts |= {"tokenizer": "openai", "fp32": gate, "fp16": gate}
    facts["times_yardstick"] = {"image": 12.34, "text": 0.51}
    page = encoders_page.render(
        {"date": "2026-11-28", "num_known": 1, "machine": MACHINE, "models": {"RN50": facts}}
    )
    assert "| 200 | 12.3 | 0.5 | 1 - 2e-07 |" in page
    assert "on 2 cores of Some CPU (AVX-512, VNNI)." in page
