"""Who takes part in a run: makes what they read, starts them, and ends them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tyro.conf import FlagCreatePairsOff, UseAppendAction

import clip_rt
from benchmarks import contenders, findings
from benchmarks.contenders import OF_A_REPOSITORY, REFERENCE, AbsentError
from benchmarks.contenders.kit import Form, Kit, copy_models, make_kit
from benchmarks.contenders.process import ContenderProcess
from benchmarks.suites.cases import Case
from clip_rt.errors import InputError
from clip_rt.specs import (
    MODELS,
    TOKENIZER_FILE,
    find_spec,
    image_model,
    text_model,
    tokenizer_model,
)

QUICK = ("openvino", "triton openvino", "triton int8", "open_clip")
"""Who takes part in a quick run: little to start, and what a reader wants to know first."""
BASELINES = ("open_clip", "transformers", "onnxruntime", "openvino")
"""The first of them that takes part is the measure of the others."""
SERVED_FORMS: Mapping[str, Form] = {
    "triton onnxruntime": "onnxruntime",
    "triton openvino": "openvino",
    "triton int8": "int8",
}
START_TIMEOUT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Who shall take part, and with which model: options of the command."""

    contender: UseAppendAction[tuple[str, ...]] = ()
    """Contenders, with commas between them or one at a time."""
    full: FlagCreatePairsOff[bool] = False
    """Everything."""
    model: str = "ViT-B/32"
    """Architecture."""
    weights: str = "random"
    """As export.onnx takes them; speed does not depend on them."""
    repository: Path | None = None
    """A model repository; measures a model that is in it."""
    name: str = "drawings"
    """The model in --repository."""
    url: str | None = None
    """host:port of a Triton somewhere."""
    remote_model: str | None = None
    """The model of the server at --url."""
    infinity: Path | None = None
    """infinity_emb of its own virtual environment."""

    @property
    def names(self) -> tuple[str, ...]:
        """All who shall take part, in the order in which they are shown.

        Raises:
            InputError: a contender is not known.
        """
        wanted = split_names(self.contender, contenders.NAMES, "contender")
        wanted = wanted or [*(contenders.NAMES if self.full else QUICK)]
        known = tuple(name for name in contenders.NAMES if name in wanted)
        return known if self.url is None else (*known, f"{contenders.REMOTE}{self.url}")


def split_names(values: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return names that are given once each or with commas between them.

    Raises:
        InputError: one is not known.
    """
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"no {what} is called {name!r}; there are {', '.join(known)}.")
    return list(dict.fromkeys(names))


class RunningContenders:
    """Those who take part; a context manager, which ends them.

    Args:
        wishes: Who shall.
        cache: Folder of what is made once.
        say: Told what happens.

    Attributes:
        kit: The forms of the model.
        contenders: Those who started, by name.

    Raises:
        InputError: the model or the weights cannot be used.
    """

    kit: Kit

    def __init__(self, wishes: Wishes, *, cache: Path, say: Callable[[str], None]) -> None:
        self.contenders: dict[str, ContenderProcess] = {}
        self._wishes = wishes
        self._cache = cache
        self._say = say
        self._absent: dict[str, findings.Contender] = {}
        self._lost: dict[str, findings.Contender] = {}
        """Those who started once and then no more."""
        self._reference: ContenderProcess | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RunningContenders:
        with self._stack:
            self._scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self.kit = self._make_kit()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start_again(self) -> list[str]:
        """End everyone and start them anew; return who does not start any more, and why.

        Raises:
            InputError: as `start` does.
        """
        before = dict(self.contenders)
        for contender in before.values():
            contender.close()
        self.contenders.clear()
        self.start()
        lost = [name for name in before if name not in self.contenders]
        # What they told of themselves the first time goes with their rows.
        reasons = {name: self._absent.pop(name).absent for name in lost}
        self._lost |= {name: before[name].facts for name in lost}
        return [f"{name} did not start again: {reason}" for name, reason in reasons.items()]

    def start(self) -> None:
        """Start everyone, one after another, each of them alone at it.

        Raises:
            InputError: nobody can take part; says why.
        """
        for name in [each for each in self._wishes.names if each not in self._absent | self._lost]:
            self._say(f"start {name}")
            try:
                self.contenders[name] = self._start(name)
            except AbsentError as error:
                self._absent[name] = error.contender
        if not self.contenders:
            reasons = "; ".join(f"{name}: {each.absent}" for name, each in self._absent.items())
            raise InputError(f"nobody can take part: {reasons}.")

    @property
    def baseline(self) -> str:
        """Whose times are the measure of the others."""
        return next(name for name in (*BASELINES, *self.contenders) if name in self.contenders)

    @property
    def facts(self) -> list[findings.Contender]:
        """All who were to take part, the absent among them; after `close` with their memory."""
        started = {name: each.facts for name, each in self.contenders.items()}
        found = started | self._absent | self._lost
        return [found[name] for name in self._wishes.names if name in found]

    @property
    def served(self) -> dict[str, tuple[Path, str]]:
        """Repository and name of the model, of those that the embedded Triton serves."""
        return {
            name: (self.kit.repository(form), self.kit.name)
            for name, form in SERVED_FORMS.items()
            if name in self.contenders
        }

    def reference(self, case: Case) -> NDArray[np.float32]:
        """Return what FP32 torch answers; for a model that is exported already, ONNX Runtime.

        Raises:
            AbsentError: it cannot be started.
        """
        if self._reference is None:
            name = REFERENCE.name if self._wishes.repository is None else "onnxruntime"
            self._reference = self._start(name)
        self._reference.load(case.key, case.call, case.items)
        answer = self._reference.answer(case.key)
        self._reference.forget(case.key)
        return answer

    def close(self) -> None:
        """End everyone."""
        self._stack.close()

    def _start(self, name: str) -> ContenderProcess:
        return self._stack.enter_context(
            contenders.start(
                name,
                self.kit,
                infinity=self._wishes.infinity,
                model=self._wishes.remote_model,
            )
        )

    def _make_kit(self) -> Kit:
        wishes = self._wishes
        if wishes.repository is not None:
            return self._copy_repository(wishes.repository, wishes.name)
        spec = find_spec(wishes.model)
        needs = contenders.find_needs(wishes.names, spec, infinity=wishes.infinity)
        return make_kit(wishes.model, wishes.weights, self._cache, needs, say=self._say)

    def _copy_repository(self, source: Path, name: str) -> Kit:
        """Make a kit of a model that is exported, without changing the repository it is in.

        Raises:
            InputError: it is in another precision than FP32, or cannot be served so.
        """
        # Only here: they load what no contender shall be measured with.
        from export.models import served_version
        from export.repository import configure

        for each in self._wishes.names:
            if each in contenders.NAMES and each not in OF_A_REPOSITORY:
                reason = "a repository has the exported model only, not what this one reads"
                self._absent[each] = replace(contenders.find(each).facts, absent=reason)
        with clip_rt.Client(
            repository=source, model=name, start_timeout_s=START_TIMEOUT_S
        ) as client:
            manifest = client.manifest
        if manifest.precision not in ("fp32", "fp16_weights"):
            raise InputError(
                f"{name!r} in {source} is {manifest.precision}; there is nothing in FP32 to hold "
                "its answers against. Name an FP32 model, or measure with --model and --weights."
            )
        tokenizer_file = None
        if manifest.tokenization.kind == TOKENIZER_FILE:
            place = source / tokenizer_model(name)
            tokenizer_file = (place / str(served_version(place)) / TOKENIZER_FILE).read_bytes()
        kit = Kit(
            folder=self._scratch / "kit",
            spec=MODELS.get(manifest.architecture),
            name=name,
            manifest=manifest,
            tokenizer_file=tokenizer_file,
            version=served_version(source / image_model(name)),
            logit_scale=manifest.logit_scale,
            logit_bias=manifest.logit_bias,
        )
        # Those that are called directly read the files of the first.
        forms: set[Form] = {"onnxruntime"}
        forms |= {
            SERVED_FORMS[each]
            for each in self._wishes.names
            if each in OF_A_REPOSITORY and each in SERVED_FORMS
        }
        for form in forms:
            for folder in (image_model(name), text_model(name), tokenizer_model(name)):
                if (source / folder).is_dir():
                    copy_models(source / folder, kit.repository(form) / folder)
            if f"triton {form}" in self._wishes.names:
                configure(kit.repository(form), name, runtime=form)
        return kit


def describe_all(wishes: Wishes) -> list[findings.Contender]:
    """Say who there is, and why one could not take part here, as far as that is seen at once."""
    spec = find_spec(wishes.model)
    found = []
    for name in contenders.NAMES:
        facts = contenders.find(name).facts
        absent = contenders.why_absent(name, spec, infinity=wishes.infinity)
        found.append(replace(facts, absent=absent))
    return found
