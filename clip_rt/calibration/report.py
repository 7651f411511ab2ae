"""A fit or a comparison of groups as one page of HTML that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from clip_rt.calibration.calibrate import Calibrated, find_threshold
from clip_rt.calibration.groups import ERROR, Comparison
from clip_rt.moderation.policy import Interval

# Neither the page nor what is written into it can fetch or run anything.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{
  max-width: 80rem; margin: 0 auto; padding: 1rem; color: #1f2328; background: #fff;
  font: 0.9375rem/1.5 system-ui, sans-serif;
}}
h1 {{ font-size: 1.25rem; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: 0.25rem 0.75rem; border-bottom: 1px solid #d1d9e0; text-align: right; }}
th {{ font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; }}
.warning {{ padding: 0.5rem 0.75rem; border-left: 4px solid #b42318; background: #fef3f2; }}
.good {{ padding: 0.5rem 0.75rem; border-left: 4px solid #1a7f37; background: #f0fff4; }}
.faint {{ color: #59636e; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def describe_fit(fit: Calibrated, picture: bytes) -> str:
    """Return the page of a fitted policy.

    Args:
        fit: Of the policy.
        picture: PNG of `plots.draw_calibration`.
    """
    policy, parts = fit.policy, []
    facts = f"{len(fit.is_true):,} images, model {policy.model}, fitted on {policy.date}"
    parts.append(f'<p class="faint">{escape(facts)}</p>')
    parts += [_say("warning", each) for each in warnings_of(fit)]
    if (error := policy.calibration_error) is not None:
        parts.append(
            f"<p>Expected calibration error: {error.before:.3f} with the model's own "
            f"probabilities, {error.after:.3f} with those of the policy.</p>"
        )
    parts.append(_embed(picture, "Reliability, precision and recall, confusion"))
    header = (
        *("label", "action", "images", "target", "threshold", "flagged"),
        *("precision", "recall", "promised"),
    )
    rows = []
    for label in policy.labels:
        measured, target, threshold = label.measured, label.target, find_threshold(label)
        if measured is None or target is None:
            continue
        rows.append(
            (
                label.name,
                label.action if label.block_threshold is not None else "review",
                f"{measured.num_true:,}",
                f"{target.measure} {target.value:g}",
                "" if threshold is None else f"{threshold:.3f}",
                f"{measured.num_flagged:,}",
                _show(measured.precision),
                _show(measured.recall),
                "yes" if measured.is_target_met else "no",
            )
        )
    parts.append(_table(header, rows))
    parts.append(
        '<p class="faint">Figures are of predictions of images that were not fitted on, in five '
        "folds, with 95 % intervals (Wilson). A threshold is promised where a miss of its target "
        "is refuted with 95 % confidence. Images of another kind than these may differ.</p>"
    )
    return PAGE.format(title=escape(f"Policy {policy.name}"), body="\n".join(parts))


def warnings_of(fit: Calibrated) -> list[str]:
    """Return what a policy does not promise, a sentence each."""
    return [
        f"{name!r} has no threshold that is promised: {shortfall}."
        for name, shortfall in fit.policy.shortfalls.items()
    ]


def describe_groups(comparison: Comparison, picture: bytes, title: str) -> str:
    """Return the page of a comparison of groups.

    Args:
        comparison: Of groups.
        picture: PNG of `plots.draw_groups`.
        title: Any text.
    """
    found = differences_of(comparison)
    parts = [_say("warning", each) for each in found] or [
        _say(
            "good",
            "No label differs between groups more than chance may explain. That shows no equality: "
            "with more images smaller differences would be found.",
        )
    ]
    parts.append(_embed(picture, "Rate of each label in each group"))
    header = ("label", *comparison.groups)
    low, high = comparison.intervals
    rows = [
        (
            label,
            *(
                f"{comparison.rates[group, index]:.3f} ({low[group, index]:.3f} to "
                f"{high[group, index]:.3f})"
                for group in range(len(comparison.groups))
            ),
        )
        for index, label in enumerate(comparison.labels)
    ]
    parts.append(_table(header, rows))
    sizes = zip(comparison.groups, comparison.num_images.tolist(), strict=True)
    images = ", ".join(f"{group}: {number:,} images" for group, number in sizes)
    parts.append(
        f'<p class="faint">{escape(images)}. Rates with 95 % intervals (Wilson). Groups are '
        "compared in pairs, label by label, with Fisher's exact test; all tests share one error of "
        f"{ERROR:.0%} (Holm).</p>"
    )
    return PAGE.format(title=escape(title), body="\n".join(parts))


def differences_of(comparison: Comparison) -> list[str]:
    """Return where groups differ, a sentence each, the largest difference first."""
    found = []
    for index, label in enumerate(comparison.labels):
        rates = comparison.rates[:, index]
        for first, one in enumerate(comparison.groups):
            for second in range(first + 1, len(comparison.groups)):
                if comparison.differs[first, second, index]:
                    text = (
                        f"{label!r} is given to {rates[first]:.1%} of {one!r} and to "
                        f"{rates[second]:.1%} of {comparison.groups[second]!r} "
                        f"(p = {comparison.p_values[first, second, index]:.2g}, corrected)."
                    )
                    found.append((-abs(rates[first] - rates[second]), text))
    return [text for _, text in sorted(found)]


def _say(kind: str, text: str) -> str:
    return f'<p class="{kind}">{escape(text)}</p>'


def _embed(picture: bytes, words: str) -> str:
    encoded = base64.b64encode(picture).decode("ascii")
    return f'<p><img alt="{escape(words)}" src="data:image/png;base64,{encoded}"></p>'


def _show(share: Interval | None) -> str:
    return "" if share is None else f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(each)}</td>" for each in row) + "</tr>\n" for row in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"
