"""A linear classifier on embeddings, read from a file; image embeddings in, scores out.

`training.probe` fits one and `Client.classify` serves it. A file is an .npz of plain arrays:
nothing in it is unpickled or executed, and its size is checked before it is read.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.classification import zero_shot
from clip_rt.classification.zero_shot import Scores
from clip_rt.errors import CheckpointError, ContractError, InputError

FORMAT = "clip_rt.probe/1"
MAX_BYTES = 512 * 1024**2
"""Largest file, and largest array in one; 100,000 classes of 1,024 numbers are 400 MB."""
_MEMBERS = ("weight", "bias", "facts")


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """Logits of C classes as an affine function of an embedding.

    Raises:
        InputError: the shapes do not fit each other, or a value is not finite.
    """

    weight: NDArray[np.float32]
    """float32 (C, D)."""
    bias: NDArray[np.float32]
    """float32 (C,)."""
    labels: tuple[str, ...]
    """C names."""
    fingerprint: str
    """Of the weights whose embeddings it was fitted on, as `Manifest.fingerprint`."""
    method: str = ""
    """How it came about, for people to read."""

    def __post_init__(self) -> None:
        num_labels = len(self.labels)
        fits = self.weight.ndim == 2 and len(self.weight) == num_labels == self.bias.size > 0
        if not fits or self.bias.ndim != 1:
            raise InputError(
                f"weight {self.weight.shape}, bias {self.bias.shape} and {num_labels} labels do "
                "not fit; (C, D), (C,) and C >= 1 labels are needed."
            )
        for name in ("weight", "bias"):
            values = getattr(self, name).astype(np.float32)
            if not np.isfinite(values).all():
                raise InputError(f"the {name} of the probe has NaN or infinite values.")
            object.__setattr__(self, name, values)

    def classify(self, image_embeddings: NDArray[np.floating[Any]]) -> Scores:
        """Score images.

        Args:
            image_embeddings: (N, D), rows of length 1; N = 0 gives scores of no image.

        Raises:
            InputError: the embeddings have another number of columns.
        """
        # A bias is the weight of one more number that is 1 in every image.
        ones = np.ones((*image_embeddings.shape[:-1], 1), np.float32)
        return zero_shot.classify(
            image_embeddings=np.concatenate([image_embeddings, ones], axis=-1),
            class_embeddings=np.concatenate([self.weight, self.bias[:, None]], axis=1),
            labels=self.labels,
            logit_scale=1.0,
        )

    def check_weights(self, fingerprint: str, model: str) -> None:
        """Refuse embeddings of other weights than it was fitted on.

        Args:
            fingerprint: Of the weights of the model that is served.
            model: Its name.

        Raises:
            ContractError: they are others.
        """
        if self.fingerprint != fingerprint:
            raise ContractError(
                f"the probe was fitted on embeddings of the weights {self.fingerprint[:12]!r}, and "
                f"{model!r} has {fingerprint[:12]!r}. Fit it again on these, or name the model it "
                "belongs to with model=.",
                expected=self.fingerprint,
                found=fingerprint,
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the new one, never a part.

        Raises:
            CheckpointError: it cannot be written, or its name does not end in .npz.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise CheckpointError(f"a probe is an .npz file; {str(path)!r} has another ending.")
        facts = {
            "format": FORMAT,
            "labels": self.labels,
            "fingerprint": self.fingerprint,
            "method": self.method,
        }
        text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, weight=self.weight, bias=self.bias, facts=text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"the probe {str(path)!r} cannot be written: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: no such file, damaged, too large, or something else than a probe.
        """
        path = Path(path)
        try:
            _check_sizes(path)
            with np.load(path, allow_pickle=False) as file:
                weight, bias, text = (file[name] for name in _MEMBERS)
            facts = json.loads(bytes(text))
            if facts["format"] != FORMAT:
                raise ValueError(f"its format is {facts['format']!r}, not {FORMAT!r}")
            if weight.dtype != np.float32 or bias.dtype != np.float32:
                raise ValueError(f"its numbers are {weight.dtype} and {bias.dtype}, not float32")
            labels, strings = facts["labels"], (facts["fingerprint"], facts["method"])
            if not isinstance(labels, list) or not all(
                isinstance(each, str) for each in (*labels, *strings)
            ):
                raise ValueError("its labels, fingerprint and method are not strings")
            return cls(
                weight=weight,
                bias=bias,
                labels=tuple(labels),
                fingerprint=strings[0],
                method=strings[1],
            )
        # A damaged archive fails in zipfile, zlib, numpy and json in many ways.
        except Exception as error:
            raise CheckpointError(
                f"{str(path)!r} is not a probe that can be read: {error}. Make one with "
                "python -m training.probe."
            ) from error


def _check_sizes(path: Path) -> None:
    """Look at the sizes in the archive's directory before anything is unpacked."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sorted(each.filename for each in members) != sorted(f"{name}.npy" for name in _MEMBERS):
        raise ValueError(f"its {len(members)} members are not {', '.join(_MEMBERS)}")
    num_bytes = sum(each.file_size for each in members)
    if num_bytes > MAX_BYTES:
        raise ValueError(f"it unpacks to {num_bytes:,} bytes; {MAX_BYTES:,} are read")
