"""What a run on a GPU found as tables: in the terminal, and as Markdown for the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.gpu.document import result_of

Interval = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """A title, heads, and rows; the first columns are text."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_text: int = 1

    def markdown(self) -> str:
        """Return the table as Markdown; its title is left to the page."""
        marks = ["---"] * self.num_text + ["--:"] * (len(self.heads) - self.num_text)
        lines = [self.heads, tuple(marks), *self.rows]
        return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def tables(run: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of what was measured, in the order of the stages."""
    for make in (_rates, _parity, _speed, _training, _preprocessing):
        table = make(run)
        if table.rows:
            yield table


def absent(run: Mapping[str, Any]) -> list[str]:
    """Return what was not there, and why."""
    installed = run.get("installed", {})
    return [f"{name}: {each['absent']}" for name, each in installed.items() if "absent" in each]


def failures(run: Mapping[str, Any]) -> list[str]:
    """Return what failed, was cut off or was left out for want of time, stage by stage."""
    found = []
    for name in run["planned"]:
        stage = run["stages"].get(name, {"status": "not begun"})
        if stage["status"] != "finished":
            found.append(f"{name}: {stage['status']} {stage.get('error', '')}".strip())
        result = stage.get("result", {})
        found += [f"{name}: {what}: {why}" for what, why in result.get("failed", {}).items()]
        found += [
            f"{name}: {row['model']} in {row['runtime']}, {row['precision']}: {row['failed']}"
            for row in result.get("rows", [])
            if "failed" in row
        ]
        if left_out := len(result.get("left_out", [])):
            found.append(f"{name}: {left_out} cases left out for want of time")
    return found


def show(run: Mapping[str, Any], console: Console) -> None:
    """Print all tables, and what is missing."""
    for table in tables(run):
        shown = RichTable(title=table.title, title_justify="left")
        for place, head in enumerate(table.heads):
            shown.add_column(head, justify="left" if place < table.num_text else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for title, lines in (("not installed", absent(run)), ("not measured", failures(run))):
        for line in lines:
            console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)


def number(value: float) -> str:
    """Return three digits that matter."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.3g}"


def percent(interval: Interval | None) -> str:
    """Return a share in percent."""
    return "" if interval is None else f"{100 * interval['median']:.1f} %"


def _median(row: Mapping[str, Any], name: str) -> str:
    return number(row[name]["median"]) if name in row else ""


def _rates(run: Mapping[str, Any]) -> Table:
    found = result_of(run, "device")
    rows = [
        (f"{name.upper()} products", number(rate["median"]), _mlp(found, name), "TFLOP/s")
        for name, rate in found.get("gemm_tflop_per_s", {}).items()
    ]
    copies = {
        "copy_gb_per_s": "copy within the device, read and written",
        "to_device_gb_per_s": "from pinned memory",
        "from_device_gb_per_s": "to pinned memory",
    }
    rows += [(title, _median(found, name), "", "GB/s") for name, title in copies.items()
             if name in found]  # fmt: skip
    side = found.get("gemm_side", "")
    return Table("Rates", ("", f"matrices of {side}", "an MLP of ViT-L/14", "unit"), rows)


def _mlp(found: Mapping[str, Any], name: str) -> str:
    rates = found.get("mlp_tflop_per_s", {})
    return number(rates[name]["median"]) if name in rates else ""


def _parity(run: Mapping[str, Any]) -> Table:
    rows = [
        (
            *(row["model"], row["runtime"], row["precision"].upper()),
            *(f"{row[tower]['min_cosine']:.6f}" for tower in ("image", "text")),
            str(row["num_cases"]),
            "within" if row["passed"] else "**beyond**",
        )
        for stage in ("parity", "siglip")
        for row in result_of(run, stage).get("rows", [])
        if "failed" not in row
    ]
    heads = ("model", "runtime", "precision", "images", "texts", "cases", "FP16's tolerance")
    return Table("Smallest cosine with FP32 torch", heads, rows, 3)


def _speed(run: Mapping[str, Any]) -> Table:
    rows = []
    cases = [
        case for stage in ("encoders", "siglip") for case in result_of(run, stage).get("cases", [])
    ]
    for case in cases:
        for name, row in case["rows"].items():
            rows.append(
                (
                    f"{case['model']}, {case['batch']} {case['tower']}{'s' * (case['batch'] > 1)}",
                    name,
                    _median(row, "device_ms"),
                    _median(row, "wall_ms"),
                    _median(row, "items_per_s"),
                    percent(row.get("gemm_share")),
                    f"{row['speed_to_open_clip']:.2f}×" if "speed_to_open_clip" in row else "",
                    number(row["items_per_joule"]) if "items_per_joule" in row else "",
                )
            )
    heads = (
        *("call", "by", "device, ms", "with transfers, ms", "items/s", "of the GEMM rate"),
        *("of open_clip", "items/s per W"),
    )
    return Table("Encoders in FP16", heads, rows, 2)


def _training(run: Mapping[str, Any]) -> Table:
    rows = []
    for model in result_of(run, "training").get("models", []):
        how = "compiled" if model["is_compiled"] else "eager"
        for name, row in model["rows"].items():
            if "step_ms" in row:
                rows.append(
                    (
                        f"{model['model']}, {model['batch']} pairs, {how}",
                        name,
                        _median(row, "step_ms"),
                        _median(row, "images_per_s"),
                        percent(row.get("mfu")),
                        f"{row['memory_gib']:.1f}" if "memory_gib" in row else "",
                        f"{row['speed_to_open_clip']:.2f}×" if "speed_to_open_clip" in row else "",
                    )
                )
    heads = ("step", "by", "ms", "images/s", "MFU", "memory, GiB", "of open_clip")
    return Table("A training step in bf16", heads, rows, 2)


def _preprocessing(run: Mapping[str, Any]) -> Table:
    found = result_of(run, "preprocessing")
    differences = found.get("mean_level_difference", {})
    rows = [
        (name, number(rate["median"]), number(differences[name]) if name in differences else "0")
        for name, rate in found.get("images_per_s", {}).items()
    ]
    width, height = found.get("jpeg_px", ("", ""))
    heads = ("by", f"JPEGs of {width}x{height} a second", "mean difference, levels of 255")
    return Table("Preprocessing", heads, rows)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
