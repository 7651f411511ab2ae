"""What a run says while it goes: a line of JSON, a point for TensorBoard, a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_rt.errors import InputError


class Journal:
    """The log of one run, on the process that keeps it.

    Args:
        out_dir: Where log.jsonl is.
        step: Updates already done; what an earlier life of the run wrote of later ones is dropped.
        num_steps: Updates in all.
        elapsed_s: Time the run took so far.
        tensorboard: Write out_dir/tensorboard too.
        silent: Keep no log and show no bar: another process does.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        step: int,
        num_steps: int,
        elapsed_s: float = 0.0,
        tensorboard: bool = False,
        silent: bool = False,
    ) -> None:
        self.path = out_dir / "log.jsonl"
        self._begun_at_s = time.monotonic()
        self._earlier_s = elapsed_s
        self._first_step = step
        self._silent = silent
        self._board = _open_board(out_dir, step) if tensorboard and not silent else None
        self._shown: dict[str, str] = {}
        self.bar = tqdm(
            desc="training",
            initial=step,
            total=num_steps,
            unit="step",
            dynamic_ncols=True,
            disable=silent,
        )
        if not silent:
            _drop_after(self.path, step)

    @property
    def elapsed_s(self) -> float:
        """Time the run took, over all its lives."""
        return self._earlier_s + time.monotonic() - self._begun_at_s

    def steps_per_s(self, step: int) -> float:
        """Return the mean speed in this life of the run."""
        return (step - self._first_step) / (time.monotonic() - self._begun_at_s)

    def write(self, step: int, **values: Any) -> None:
        """Note what is known at a step."""
        if self._silent:
            return
        line = {"step": step, "elapsed_s": round(self.elapsed_s, 1), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def show(self, **values: str) -> None:
        """Say something behind the progress bar until it is said anew."""
        self._shown |= values
        self.bar.set_postfix(self._shown)

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if not self._silent:
            tqdm.write(message)

    def rewind(self, step: int) -> None:
        """Take back what was written of later steps than `step`."""
        if not self._silent:
            _drop_after(self.path, step)
            self.bar.n = step
            self.bar.refresh()

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self._board is not None:
            self._board.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read log.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in read_journal(path) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def _open_board(out_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"tensorboard is set, and not installed ({error}): pip install tensorboard."
        ) from error
    return SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
