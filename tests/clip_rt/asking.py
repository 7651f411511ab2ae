"""Runs commands that ask the bundled model, in this process, as a user's shell would."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from clip_rt_drawings import EXAMPLES

from clip_rt.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "training/sample"
BUNDLED = ROOT / "model_repository"
LABELS = ("rocket", "pizza", "bicycle", "guitar")
MODEL = ("--repository", str(BUNDLED), "--server", "in_process")
PICTURES = sorted(EXAMPLES.glob("*.png"))


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, object]]:
        """The objects of JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


def ask(capfd: pytest.CaptureFixture[str], *arguments: object, stdin: bytes = b"") -> Done:
    """Run `clip-rt` with arguments."""
    capfd.readouterr()
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        status = main([str(each) for each in arguments])
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdin = before
    out, err = capfd.readouterr()
    return Done(status, out, err)
