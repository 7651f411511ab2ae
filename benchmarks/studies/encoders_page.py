"""The page "Which model should I serve", written from what `benchmarks.studies.encoders` found."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.common import ROOT
from clip_rt.processor import in_brackets

PAGE = ROOT / "docs/which-model.md"
RESULTS = "*_encoders.json"


@dataclass(frozen=True)
class Family:
    """Configurations of open_clip whose weights come from one publisher."""

    name: str
    pattern: str
    """Of the names of its configurations."""
    licence: str
    """Of the published weights, as their authors state it."""
    why: str
    """What speaks for it."""


FAMILIES = (
    Family(
        "SigLIP 2",
        r"SigLIP2",
        "Apache-2.0",
        "The default for something new: many languages, sizes from base to giant. Probabilities "
        "stand for themselves, so that none of the labels may fit.",
    ),
    Family("PE-Core", r"^PE-Core", "Apache-2.0", "The most accurate of its size on images."),
    Family(
        "MobileCLIP, MobileCLIP 2",
        r"^MobileCLIP",
        "apple-amlr: research only",
        "Small and fast on processors.",
    ),
    Family(
        "EVA",
        r"^EVA",
        "MIT",
        "Accurate at CLIP's size; its numbers leave FP16's range easily, which is checked.",
    ),
    Family("ViTamin", r"^ViTamin", "MIT", "Convolutions before attention; many sizes."),
    Family("CLIPA", r"CLIPA", "Apache-2.0", "Trained cheaply, with short texts."),
    Family(
        "MetaCLIP 2",
        r"worldwide",
        "CC-BY-NC-4.0",
        "Over 300 languages; a vocabulary of 900,000 tokens.",
    ),
    Family("NLLB-CLIP", r"^nllb", "CC-BY-NC-4.0", "201 languages."),
    Family("SigLIP", r"SigLIP", "Apache-2.0", "The one before SigLIP 2; -i18n has many languages."),
    Family("CoCa", r"^coca", "MIT", "CLIP beside a captioner, of which only CLIP is served."),
    Family(
        "CLIP with text towers of others",
        r"roberta|^mt5",
        "MIT",
        "Many languages with XLM-RoBERTa.",
    ),
    Family("CLIP with ConvNeXt", r"^convnext", "MIT", "Convolutions only; large images at ease."),
    Family(
        "CLIP",
        r"",
        "MIT (OpenAI, LAION, DataComp); CC-BY-NC-4.0 (MetaCLIP); apple-amlr (DFN)",
        "What most tools know; weights of many publishers. Ours run faster by their own names, "
        "such as `ViT-B/32`: see [Your own weights](your-weights.md).",
    ),
)
"""The first whose pattern is found in a name has it."""

_HEAD = """\
# Which model should I serve?

<!-- Written by python -m benchmarks.studies.encoders --render; a test holds it to that. -->

All of these are exported by one command, `python -m export.onnx --model open_clip:NAME --weights
hf:owner/name`; see [Models of other libraries](other-models.md). What the published weights may be
used for is their authors' to say: read the model card.

- **In doubt** take SigLIP 2: `ViT-B-16-SigLIP2` on processors, `ViT-SO400M-16-SigLIP2-384` on
  GPUs.
- **Little time an image**: MobileCLIP 2, or CLIP's `ViT-B-32` with fewer patches than any other of
  its width.
- **Other languages than English**: SigLIP 2, MetaCLIP 2 or NLLB-CLIP.
- **An index that exists already** stays with the model that made it; `python -m export.compare`
  says whether vectors of another export mix with it.

A side of 384 px costs three times the time of 224 px: (384/224)² patches, and attention grows
faster than that. Text towers whose texts are always padded to one length cost the same for each
text.

## What speaks for which

| family | licence of the weights | what speaks for it |
|---|---|---|
"""
_TABLE = """
## What was exported

{num_exported} of open_clip's {num_known} configurations were exported on {date} with random
weights, norms and biases moved away from where training begins, and passed the parity check of
every export in FP32 unless it says otherwise here: the lowest cosine between the library's own
FP32 embeddings and the exported graph's, of both towers, over all batches and text lengths. In
FP16 a cosine below 0.9995 is refused; ONNX Runtime ran it on a processor, which computes FP16 in
FP32 and rounds in between. `python -m benchmarks.studies.encoders` writes this table, and goes on
where it was stopped.
"""
_TIMES = """
"image" and "text" say how many times as long as `ViT-B-32` a model takes for one image, and for one
short text, in FP32 by OpenVINO, by turns on {cpu}.
"""
_NUMBERS = ("side, px", "tokens", "parameters, M", "image", "text", "FP32", "FP16")
"""Columns that are aligned to the right."""


def newest(folder: Path) -> Path:
    """Return the newest result in a folder."""
    return max(folder.glob(RESULTS))


def find_family(model: str) -> Family:
    """Return whose weights a configuration is for."""
    return next(family for family in FAMILIES if re.search(family.pattern, model))


def render(result: dict[str, Any]) -> str:
    """Return the page, of the JSON of the study."""
    models: dict[str, Any] = result["models"]
    measured = {name: found for name, found in models.items() if "fp32" in found}
    lines = [f"| {each.name} | {each.licence} | {each.why} |\n" for each in FAMILIES]
    table = _TABLE.format(
        num_exported=len(measured),
        num_known=result["num_known"],
        date=result["date"],
    )
    has_times = any("times_yardstick" in found for found in measured.values())
    if has_times:
        table += _TIMES.format(cpu=_describe_processor(result["machine"]))
    order = sorted(
        measured,
        key=lambda name: (FAMILIES.index(find_family(name)), measured[name]["parameters"], name),
    )
    rows = [_row(name, measured[name], has_times=has_times) for name in order]
    columns = list(rows[0])
    rules = ("---:" if each in _NUMBERS else "---" for each in columns)
    lines_of_table = [f"| {' | '.join(columns)} |\n", f"|{'|'.join(rules)}|\n"]
    lines_of_table += [f"| {' | '.join(row.values())} |\n" for row in rows]
    failed = [
        f"- `{name}`: {found.get('failed') or found['left_out']}\n"
        for name, found in sorted(models.items())
        if "fp32" not in found
    ]
    left = "\nNot exported:\n\n" + "".join(failed) if failed else ""
    return _HEAD + "".join(lines) + table + "\n" + "".join(lines_of_table) + left


def _describe_processor(facts: dict[str, Any]) -> str:
    return f"{facts['usable_cores']} cores of {facts['cpu']}" + in_brackets(facts["cpu_flags"], {})


def _row(name: str, found: dict[str, Any], *, has_times: bool) -> dict[str, str]:
    """Return the cells of a model by their columns."""
    row = {
        "model": f"`{name}`",
        "side, px": str(found["side_px"]),
        "tokens": str(found["context_length"]),
        "text length": "as long as it is" if found["any_length"] else "always the same",
        "tokenizer": "OpenAI's" if found["tokenizer"] == "openai" else "tokenizer.json",
        "parameters, M": f"{found['parameters'] / 1e6:.0f}",
    }
    if has_times:
        times = found.get("times_yardstick", {})
        row |= {each: f"{times[each]:.1f}" if each in times else "" for each in ("image", "text")}
    fp16 = _worst(found["fp16"]) if "fp16" in found else found.get("failed", "")
    return row | {"FP32": _worst(found["fp32"]), "FP16": fp16}


def _worst(gate: dict[str, Any]) -> str:
    """Return how far from 1 the lowest cosine is, as it is easier to read."""
    distance = max(1 - min(gate["image"], gate["text"]), 0.0)
    shown = f"1 - {distance:.0e}"
    return shown if gate["passed"] else f"refused: {shown}"


def write_page(source: Path) -> Path:
    """Write the page from a result, or from the newest in a folder; return it."""
    file = newest(source) if source.is_dir() else source
    PAGE.write_text(render(json.loads(file.read_text("utf-8"))), "utf-8")
    return PAGE
