"""Options of commands that look for the labels of a policy, or for labels that are named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from clip_rt.commands.labels import read_labels, read_templates
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from clip_rt.moderation.policy import Policy


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What to look for.

    Raises:
        InputError: it is named twice or not at all.
    """

    labels: str | None = None
    """Names with commas between them."""
    labels_file: Path | None = None
    """A text file with a label on each line."""
    policy: str | None = None
    """Labels and prompts of a policy: a file, or a starter: medical, people-present, safe-for-work,
    screenshots, text-in-image, violence, weapons."""
    templates: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text with {} for the label, or a set: openai_imagenet, openai_cifar, simple."""
    none_of_these: tyro.conf.FlagCreatePairsOff[bool] = False
    """Of a softmax: add the answer "none of these"."""

    def __post_init__(self) -> None:
        given = [self.labels, self.labels_file, self.policy]
        if sum(each is not None for each in given) != 1:
            raise InputError("name what to look for, by one of --labels, --labels-file, --policy.")
        if self.policy is not None and self.none_of_these:
            raise InputError("--policy says itself what it has; leave --none-of-these out.")

    def read(self, name: str, kind: Literal["softmax", "independent"] | None) -> Policy:
        """Return the policy, or one of the labels that are named.

        Args:
            name: Of a policy that is made of labels.
            kind: None is that of the policy, or independent.

        Raises:
            InputError: labels cannot be read.
            PolicyError: there is no such policy, or it cannot be of that kind.
        """
        from clip_rt.inputs.prompts import find_templates
        from clip_rt.moderation.policy import Label, Policy, find_policy

        templates = find_templates(read_templates(self.templates))
        if self.policy is not None:
            policy = find_policy(self.policy)
            if self.templates:
                policy = replace(policy, templates=templates)
            return policy
        return Policy(
            name=name,
            kind=kind or "independent",
            labels=tuple(Label(name=each) for each in read_labels(self.labels, self.labels_file)),
            templates=templates,
            none_of_these=self.none_of_these,
        )
