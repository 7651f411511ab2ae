"""A policy whose numbers are made up, for tests of what is decided by one."""

from clip_rt.moderation.policy import Calibration, Label, Policy
from clip_rt.wire.manifest import Manifest

CALIBRATION = Calibration(slope=60.0, intercept=-31.0)
"""Tells a rocket and a pizza apart by the bundled model."""


def make_policy(manifest: Manifest) -> Policy:
    return Policy(
        name="things",
        labels=(
            Label(
                name="rocket",
                prompts=("rocket", "a space ship"),
                action="block",
                review_threshold=0.5,
                block_threshold=0.9,
                calibration=CALIBRATION,
            ),
            Label(name="pizza", review_threshold=0.5, calibration=CALIBRATION),
        ),
        templates=("{}", "an emoji of {}"),
        model=manifest.model,
        fingerprint=manifest.fingerprint,
    )
