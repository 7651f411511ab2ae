"""What the vectors of a model depend on, and what `export.compare` said about two such models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_rt.errors import ContractError, InputError
from clip_rt.wire.manifest import Manifest

FIELDS = (
    "fingerprint",
    "precision",
    "embedding_dim",
    "activation",
    "side_px",
    "mean",
    "std",
    "resizing",
    "tokenization",
)
"""Of a manifest: two models that agree in these give the same vectors, but for rounding."""
MAX_REPORT_BYTES = 16 * 1024**2
MIXING = ("interchangeable", "mixable")
"""Verdicts of `export.compare` by which two models may fill one index."""


@dataclass(frozen=True)
class Identity:
    """What vectors depend on, as canonical JSON; equal where vectors may be compared."""

    json: str

    @classmethod
    def of(cls, manifest: Manifest) -> Identity:
        """Return that of a served model."""
        return cls._of(asdict(manifest))

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Identity:
        return cls(json.dumps({name: values[name] for name in FIELDS}, sort_keys=True))

    @property
    def values(self) -> dict[str, Any]:
        """The fields by name."""
        found: dict[str, Any] = json.loads(self.json)
        return found

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self.values["embedding_dim"])

    def describe_difference(self, other: Identity) -> str:
        """Say in what another one differs, this one's values first."""
        mine, theirs = self.values, other.values
        said = [
            f"{name} {str(mine[name])[:40]} and {str(theirs[name])[:40]}"
            for name in FIELDS
            if mine[name] != theirs[name]
        ]
        return "; ".join(said)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `export.compare` found: may vectors of B stand beside those of A, and ask for them?"""

    a: Identity
    """What an index was made with."""
    b: Identity
    """What is to come."""
    b_name: str
    word: str
    """interchangeable, mixable or not mixable."""
    sentence: str
    weak: tuple[str, ...]
    """Why it is less sure than it sounds."""

    @classmethod
    def read(cls, path: Path) -> Verdict:
        """Read what `python -m export.compare A B --report PATH` wrote.

        Raises:
            InputError: it is no such file.
        """
        try:
            with path.open("rb") as file:
                text = file.read(MAX_REPORT_BYTES + 1)
            if len(text) > MAX_REPORT_BYTES:
                raise ValueError(f"it has more than {MAX_REPORT_BYTES:,} bytes")
            document = json.loads(text)
            said = document["verdict"]
            return cls(
                a=Identity._of(document["a"]),
                b=Identity._of(document["b"]),
                b_name=str(document["b"]["model"]),
                word=str(said["word"]),
                sentence=str(said["sentence"]),
                weak=tuple(map(str, said["weak"])),
            )
        # Whatever JSON it is, a report it may not be.
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path} is no report of export.compare: {type(error).__name__}: {error}. Write "
                "one with python -m export.compare A B --report PATH."
            ) from error

    def check(self) -> None:
        """Refuse one by which the two must not be mixed.

        Raises:
            ContractError: it is not among `MIXING`.
        """
        if self.word not in MIXING:
            raise ContractError(
                f"export.compare says of {self.b_name!r}: {self.sentence}. Embed the images again "
                "with clip-rt index --migrate.",
                expected=MIXING,
                found=self.word,
            )
