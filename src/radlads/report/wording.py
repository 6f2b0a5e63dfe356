"""How what was measured is put in words, the same in tables, on pages and on model cards. Imports nothing slow."""

import math
from collections.abc import Mapping

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"

HELDOUT_ROWS = {
    "teacher": "teacher",
    "teacher_window_untrained": "teacher, window alone",
    "setup_without_window": "setup without window",
    **{name: name for name in ("setup", "align", "distill", "extend", "instruct", "retied")},
}
"""A summary's held-out rows in their order, and what readers are told they are."""
UNTRAINED_ROWS = ("teacher", "teacher_window_untrained", "setup_without_window", "setup")


def gap_start(summary: Mapping[str, object]) -> str:
    """Which untrained row `gap_closed` is counted from, as readers are told it."""
    return HELDOUT_ROWS["setup_without_window" if "setup_without_window" in summary else "setup"]


def heldout_title(row: str, values: Mapping[str, object]) -> str:
    """What readers are told a summary's held-out row is, with the sizes of the window that the teacher was given."""
    if "window_tokens" in values:
        return f"teacher, window {values['window_tokens']} + {values['sink_tokens']}"
    return HELDOUT_ROWS[row]


def score_text(value: float, stderr: float | None, relative: float | None, *, is_share: bool) -> str:
    """A score, ± its standard error if there is one (None or nan: there is not), in brackets that relative to the
    teacher's. is_share: of right answers, which are given in percent."""
    text = f"{value:.1%}" if is_share else f"{value:.4f}"
    if stderr is not None and not math.isnan(stderr):
        text += f" ± {100 * stderr:.1f}" if is_share else f" ± {stderr:.4f}"
    return text if relative is None else f"{text} ({relative:.1%})"


def chance_text(chance: float | None) -> str:
    """The score of guessing, which some metrics have none of."""
    return "none" if chance is None else f"{chance:.1%}"


def mixer_title(name: str) -> str:
    """A time mixer's title, or its name if the mixer cannot be found: what is only read runs no code from the working
    directory, and does not fail for a mixer that does."""
    from radlads.model.registry import find_mixer_class  # imports torch

    try:
        kind = find_mixer_class(name)
    except Exception:  # anybody's code
        return name
    return name if kind is None else kind.name_for_people()


def number_text(value: object, form: str) -> str:
    """A number in this format, or that there is none."""
    return format(value, form) if isinstance(value, int | float) else NOT_MEASURED


def bytes_in_words(value: float) -> str:
    """Decimal units, three digits at most."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def ratio_text(ratio: float) -> str:
    """A ratio as people say it: 12×, 1.25×."""
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2f}×"
