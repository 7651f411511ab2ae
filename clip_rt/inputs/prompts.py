"""Prompt templates in, prompts out: one template filled with one label gives one text.

Filling is plain replacement of the only `{}`. Neither template nor label is ever formatted, so
nothing in either can reach an attribute, a width or another field.

Source of the named sets: openai/CLIP; each set in `data/prompt_templates.json` says which file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from clip_rt.errors import TemplateError, TextError
from clip_rt.inputs.items import check_list, describe_non_string

DEFAULT_TEMPLATE = "a photo of a {}."
"""The one template used when none is asked for (Radford et al. 2021, section 3.1.4)."""
SLOT = "{}"
"""Where the label goes."""

_PATH = Path(__file__).with_name("data") / "prompt_templates.json"


def template_names() -> tuple[str, ...]:
    """Return the names of the template sets that `find_templates` knows."""
    return tuple(_load())


def find_templates(templates: str | Iterable[str] | None = None) -> tuple[str, ...]:
    """Resolve what a caller may pass as templates.

    Args:
        templates: The name of a set, or templates with exactly one `{}` each, or None for
            `DEFAULT_TEMPLATE`.

    Returns:
        At least one checked template, in order.

    Raises:
        TemplateError: no set has that name, there is no template, or one has not exactly one
            `{}`; carries its index.
    """
    if templates is None:
        return (DEFAULT_TEMPLATE,)
    if isinstance(templates, str):
        return _find_set(templates)
    listed = check_list(templates, "templates", "strings", TemplateError)
    checked = tuple(check_template(each, index=index) for index, each in enumerate(listed))
    if not checked:
        raise TemplateError(f"there is no template; one like {DEFAULT_TEMPLATE!r} is needed.")
    return checked


def check_template(template: str, *, index: int | None = None) -> str:
    """Return `template` if it is a string with exactly one `{}`.

    Raises:
        TemplateError: it is not; carries `index`.
    """
    name = "template" if index is None else f"template {index}"
    if not isinstance(template, str):
        raise TemplateError(
            f"{name} {describe_non_string(template)} One is {DEFAULT_TEMPLATE!r}.",
            index=index,
        )
    num_slots = template.count(SLOT)
    if num_slots != 1:
        raise TemplateError(
            f"{name} has {num_slots} {SLOT} in {template[:80]!r}; exactly one is needed, where the "
            "label goes.",
            index=index,
        )
    return template


def check_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels in order, each a string that says something.

    Raises:
        TextError: they are no list, see `items`, or one cannot be used; then it carries its index.
    """
    checked = tuple(check_list(labels, "labels", "strings", TextError))
    for index, label in enumerate(checked):
        fill(SLOT, label, index=index)
    return checked


def fill(template: str, label: str, *, index: int | None = None) -> str:
    """Put a label into a template.

    Args:
        template: A text with exactly one `{}`.
        label: Any text that is not blank; braces in it stay as they are.
        index: Position of the label in the caller's batch, for the error.

    Returns:
        The prompt.

    Raises:
        TemplateError: the template has not exactly one `{}`.
        TextError: the label is no string, or blank; carries `index`.
    """
    check_template(template)
    name = "label" if index is None else f"label {index}"
    if not isinstance(label, str):
        raise TextError(f"{name} {describe_non_string(label)}", index=index)
    if not label.strip():
        raise TextError(
            f"{name} is {label[:20]!r} and says nothing. Name what to look for.", index=index
        )
    return template.replace(SLOT, label)


def _find_set(name: str) -> tuple[str, ...]:
    sets = _load()
    if name in sets:
        return sets[name]
    hint = " A template of your own goes into a list." if SLOT in name else ""
    raise TemplateError(
        f"no template set is called {name[:80]!r}; known are {', '.join(sets)}.{hint}"
    )


@cache
def _load() -> dict[str, tuple[str, ...]]:
    document = json.loads(_PATH.read_text(encoding="utf-8"))
    return {name: tuple(each["templates"]) for name, each in document["sets"].items()}
