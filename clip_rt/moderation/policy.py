"""A moderation policy: what is looked for, from which probability on it matters, what was measured.

A policy is data, kept as JSON. Its format is checked field by field before anything of it is used;
nothing in it is executed, formatted or taken for a path. `clip-rt calibrate` fits one on labelled
images, `Client.moderate` and `clip-rt moderate` decide by it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from clip_rt.classification.open_set import NONE_OF_THESE
from clip_rt.errors import PolicyError, TemplateError
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE, check_template
from clip_rt.moderation.document import build, read_object

FORMAT = 1
"""Of the files that are written, and the only one that is read."""
MAX_BYTES = 16 * 1024**2
"""Largest file that is read; a fitted policy of 10,000 labels has some 10 MB."""
MAX_LABELS = 10_000
MAX_PROMPTS = 200
"""Of a label, and templates of a policy."""
MAX_CHARACTERS = 1_000
"""Of a name, a prompt or a template."""

Kind: TypeAlias = Literal["independent", "softmax"]
"""Whether each label has a probability of its own, so that any number of them may fit an image; or
the labels share out 1 among themselves, so that one fits."""
Action: TypeAlias = Literal["allow", "review", "block"]
"""What becomes of an image, the mildest first."""
Measure: TypeAlias = Literal["precision", "recall"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A share that was measured, from 0 to 1, with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "value", "high"):
            _check_number(name, getattr(self, name), 0, 1)
        if not self.low <= self.value <= self.high:
            raise _refuse("value", self.value, f"it must be from low {self.low} to {self.high}.")


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a threshold is chosen for."""

    measure: Measure
    """Precision: of the images at or above the threshold, the share that the label fits. Recall: of
    the images that the label fits, the share at or above the threshold."""
    value: float
    """From 0 to 1, both excluded."""

    def __post_init__(self) -> None:
        _check_number("value", self.value, 0, 1)
        if self.value in (0, 1):
            raise _refuse("value", self.value, "it must be above 0 and below 1, such as 0.95.")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Probability that a label fits an image: sigmoid(slope * cosine + intercept)."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        for name in ("slope", "intercept"):
            _check_number(name, getattr(self, name), -1e9, 1e9)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found at the threshold of a label, on predictions of folds it was not fitted on."""

    num_images: int
    num_true: int
    """Images among them that the label fits."""
    num_flagged: int
    """Images at or above the threshold."""
    precision: Interval | None = None
    """None where no image is flagged."""
    recall: Interval | None = None
    """None where the label fits no image."""
    is_target_met: bool = False
    """Whether the target is met with 95 % confidence."""
    shortfall: str = ""
    """Why it is not, and how many images it takes; empty where it is."""

    def __post_init__(self) -> None:
        _check_count("num_images", self.num_images)
        for name in ("num_true", "num_flagged"):
            _check_count(name, getattr(self, name), most=self.num_images)


@dataclass(frozen=True, kw_only=True)
class Label:
    """One thing to look for."""

    name: str
    prompts: tuple[str, ...] = ()
    """Ways to say it, each put into every template; their embeddings are averaged. Things that look
    different are better labels of their own. Without one: the name."""
    action: Action = "review"
    """The most that it can lead to; a label with "allow" only competes with others."""
    review_threshold: float | None = None
    """Probability from which on a person should look."""
    block_threshold: float | None = None
    """Probability from which on the image is refused; not below `review_threshold`."""
    target: Target | None = None
    """What the threshold of `action` was chosen for."""
    calibration: Calibration | None = None
    """Of a policy of independent labels; None before it is fitted."""
    bias: float = 0.0
    """Of a softmax: added to the logit of the label, after the temperature."""
    measured: Measured | None = None

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        if not self.prompts:
            object.__setattr__(self, "prompts", (self.name,))
        _check_texts("prompts", self.prompts)
        _check_number("bias", self.bias, -1e6, 1e6)
        for name, actions in (
            ("review_threshold", ("review", "block")),
            ("block_threshold", ("block",)),
        ):
            if (threshold := getattr(self, name)) is None:
                continue
            _check_number(name, threshold, 0, 1)
            if self.action not in actions:
                raise _refuse(
                    name,
                    threshold,
                    f"with the action {self.action!r} it must be null; "
                    f"or make the action {' or '.join(map(repr, actions))}.",
                )
        review, block = self.review_threshold, self.block_threshold
        if review is not None and block is not None and review > block:
            raise _refuse("review_threshold", review, f"it must not be above block's {block}.")

    def decide(self, probability: float) -> tuple[Action, float | None]:
        """Return what a probability leads to, and the threshold that it reached."""
        if self.block_threshold is not None and probability >= self.block_threshold:
            return "block", self.block_threshold
        if self.review_threshold is not None and probability >= self.review_threshold:
            return "review", self.review_threshold
        return "allow", None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The labelled images that a policy was fitted on."""

    sha256: str
    """Over the images and their labels, hex."""
    size_bytes: int
    """Of the images."""
    num_images: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise _refuse("sha256", self.sha256, "it must be 64 digits, 0 to 9 and a to f.")
        _check_count("size_bytes", self.size_bytes)
        _check_count("num_images", self.num_images)


@dataclass(frozen=True, kw_only=True)
class CalibrationError:
    """Expected calibration error, from 0 to 1: how far probabilities are from shares of images."""

    before: float
    """With the model's own probabilities."""
    after: float
    """With those of the policy, on folds it was not fitted on."""

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            _check_number(name, getattr(self, name), 0, 1)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What to look for in images, and what to do about it.

    Raises:
        PolicyError: a value cannot be used; names the field, the value and what it must be.
    """

    name: str
    kind: Kind = "independent"
    labels: tuple[Label, ...]
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    """Texts with one {} each, where a prompt goes."""
    temperature: float | None = None
    """Of a softmax: what the model's logits are divided by (Guo et al. 2017); None before it is
    fitted."""
    none_of_these: bool = False
    """Whether broad background labels compete with the labels of a softmax."""
    none_bias: float = 0.0
    """Added to the logit of each of them, after the temperature."""
    model: str | None = None
    """Name of the model it was fitted with; None before."""
    fingerprint: str | None = None
    """Of its weights, as `Manifest.fingerprint`; probabilities of other weights mean nothing."""
    data: Data | None = None
    """None where it was fitted on nothing yet."""
    calibration_error: CalibrationError | None = None
    date: str | None = None
    """When it was fitted, such as 2026-11-29."""

    def __post_init__(self) -> None:
        _check_text("name", self.name)
        if not 0 < len(self.labels) <= MAX_LABELS:
            raise _refuse("labels", len(self.labels), f"there must be 1 to {MAX_LABELS:,} labels.")
        seen: set[str] = set()
        for index, label in enumerate(self.labels):
            if label.name in seen:
                raise _refuse(f"labels[{index}].name", label.name, "another has it; rename one.")
            seen.add(label.name)
            self._check_label(f"labels[{index}]", label)
        _check_texts("templates", self.templates)
        for index, template in enumerate(self.templates):
            try:
                check_template(template)
            except TemplateError as error:
                raise PolicyError(f"templates[{index}]: {error}", field="templates") from error
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 1e-6, 1e6)
        _check_number("none_bias", self.none_bias, -1e6, 1e6)
        if self.kind == "independent":
            for name in ("temperature", "none_of_these", "none_bias"):
                if value := getattr(self, name):
                    raise _refuse(name, value, "only a policy of kind 'softmax' has it.")
        if (self.model is None) != (self.fingerprint is None):
            raise _refuse("fingerprint", self.fingerprint, "it goes with model; name both or none.")
        if self.model is not None and self.fingerprint is not None:
            _check_text("model", self.model)
            _check_text("fingerprint", self.fingerprint)
        if self.date is not None:
            _check_date("date", self.date)

    def _check_label(self, field: str, label: Label) -> None:
        if self.none_of_these and label.name == NONE_OF_THESE:
            raise _refuse(f"{field}.name", label.name, "none_of_these adds it; leave it out.")
        if self.kind == "softmax" and label.calibration is not None:
            raise _refuse(
                f"{field}.calibration",
                label.calibration,
                "only a policy of kind 'independent' has it; a softmax has a temperature.",
            )
        if self.kind == "independent" and label.bias:
            raise _refuse(f"{field}.bias", label.bias, "only a policy of kind 'softmax' has it.")

    @property
    def is_calibrated(self) -> bool:
        """Whether probabilities are those of a model that it was fitted with, of every label."""
        if self.fingerprint is None:
            return False
        if self.kind == "softmax":
            return self.temperature is not None
        return all(each.calibration is not None for each in self.labels if each.action != "allow")

    @property
    def shortfalls(self) -> dict[str, str]:
        """What was promised of no threshold, and why, by the name of the label."""
        return {
            label.name: label.measured.shortfall
            for label in self.labels
            if label.measured is not None and label.measured.shortfall
        }

    def to_json(self) -> str:
        """Return the text of its file."""
        document = {"format": FORMAT, **asdict(self)}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Policy:
        """Read what `to_json` returned.

        Raises:
            PolicyError: it is no policy, of a later format, or a field cannot be used.
        """
        document = read_object(text)
        found = document.pop("format", None)
        if type(found) is not int or found != FORMAT:
            raise PolicyError(
                f"format is {found!r:.80}; this version reads {FORMAT}. Take the version "
                "of clip_rt that wrote it, or write it anew with clip-rt calibrate.",
                field="format",
            )
        return build(cls, document)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; a reader sees the old one or the new one, never a part.

        Raises:
            PolicyError: it cannot be written.
        """
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with unfinished.open("wb") as file:
                file.write(self.to_json().encode())
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise PolicyError(
                f"the policy {str(path)!r} cannot be written: {error.strerror or error}. Name a "
                "file in a folder that is there and yours to write to."
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a file.

        Raises:
            PolicyError: no such file, too large, or as `from_json`; names the file.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise PolicyError(
                f"the policy {str(path)!r} cannot be read: {error.strerror or error}."
            ) from error
        if len(text) > MAX_BYTES:
            raise PolicyError(f"{str(path)!r} has more than the {MAX_BYTES:,} bytes of a policy.")
        try:
            return cls.from_json(text)
        except PolicyError as error:
            raise PolicyError(f"the policy {str(path)!r}: {error}", field=error.field) from error


def _refuse(field: str, value: object, rule: str) -> PolicyError:
    return PolicyError(f"{field} is {value!r:.80}; {rule}", field=field)


def _check_number(field: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # type: ignore[operator]
        raise _refuse(field, value, f"it must be a number from {least:g} to {most:g}.")


def _check_count(field: str, value: object, most: float = math.inf) -> None:
    if type(value) is not int or not 0 <= value <= most:
        limit = "" if most == math.inf else f" and at most {most:,}, as many as there are images"
        raise _refuse(field, value, f"it must be a whole number, 0 or more{limit}.")


def _check_text(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_CHARACTERS:
        raise _refuse(
            field, value, f"it must be a text of at most {MAX_CHARACTERS:,} characters, not blank."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refuse(field, value, "it has half a character; write it anew.") from error


def _check_texts(field: str, values: Sequence[object]) -> None:
    if not 0 < len(values) <= MAX_PROMPTS:
        raise _refuse(field, len(values), f"there must be 1 to {MAX_PROMPTS} of them.")
    for index, value in enumerate(values):
        _check_text(f"{field}[{index}]", value)


def _check_date(field: str, value: str) -> None:
    try:
        datetime.date.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _refuse(field, value, "it must be a date such as 2026-11-29.") from error


def list_starters() -> tuple[str, ...]:
    """Return the names of the policies that come with clip_rt, which are not calibrated."""
    return tuple(sorted(path.stem for path in _starters()))


def find_policy(name: str) -> Policy:
    """Return a policy by the name of a starter, or else by the path of its file.

    Raises:
        PolicyError: there is none, or it cannot be used.
    """
    for path in _starters():
        if path.stem == name:
            return Policy.load(path)
    if not os.path.exists(name):
        raise PolicyError(
            f"there is no policy {name[:200]!r}: name a file that clip-rt calibrate wrote, or one "
            f"of {', '.join(list_starters())}."
        )
    return Policy.load(name)


def _starters() -> Iterator[Path]:
    return Path(__file__).with_name("starters").glob("*.json")
