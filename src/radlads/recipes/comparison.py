"""`radlads demo --compare`: the paper's student, and one with a kept softmax layer, beside the demo's."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from radlads.console import Console
from radlads.model.window import WindowSettings
from radlads.recipes.conversion import run_conversion
from radlads.recipes.demo_recipes import recipe_name
from radlads.recipes.stage_configs import STAGES, Conversion

FOLDER = "compare"
_LAYERS = "model.softmax_layers"
_WINDOW = {f"model.mixer.{each.name}" for each in fields(WindowSettings)}


def check_comparable(conversion: Conversion) -> None:
    """Raise ValueError unless the demo's own student is the one with a window and no kept layer, after three stages."""
    if recipe_name(conversion.recipe, conversion.mixer) != "window":
        raise ValueError("--compare holds a student with a window against others: leave out --recipe paper")
    if conversion.instruct:
        raise ValueError("--compare ends with stage 3, at equal tokens: leave out --instruct")
    if _LAYERS in (conversion.overrides or {}):
        raise ValueError(f"--compare chooses a softmax layer itself: leave out --set {_LAYERS}")


def run_comparison(conversion: Conversion, console: Console) -> dict[str, dict[str, Any]]:
    """Convert as run_conversion does, then twice more into out/compare: the paper's student on as many tokens, and one
    with a window whose best layer is the teacher's again. The summaries by the students' titles.

    Raises ValueError as check_comparable and run_conversion do.
    """
    check_comparable(conversion)
    summaries = {"window": run_conversion(conversion, console)}
    folder, kept = conversion.out / FOLDER, {**(conversion.overrides or {}), _LAYERS: "auto:1"}
    same = replace(conversion, data=conversion.corpus("train"), heldout_data=conversion.corpus("heldout"))
    unwindowed = {key: value for key, value in (conversion.overrides or {}).items() if key not in _WINDOW}
    others = {
        "paper": replace(same, recipe="paper", tokens_of="window", overrides=unwindowed, out=folder / "paper"),
        "window + 1 softmax layer": replace(same, overrides=kept, out=folder / "kept"),
    }
    for title, other in others.items():
        console.line(f"\n{title}, into {other.out}")
        summaries[title] = run_conversion(other, console)
    return summaries


def comparison_lines(summaries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """KL after each stage, and the end of each student, side by side."""
    heads = "".join(f"{f'KL, {stage}':>13}" for stage in STAGES)
    yield f"\n{'at equal tokens':26}{heads}{'top-1':>8}{'loss':>9}{'state at 8k':>13}"
    for title, summary in summaries.items():
        kl = "".join(f"{summary[stage]['kl']:13.4f}" for stage in STAGES)
        end, state = summary["extend"], summary["bytes"]["student"]["8192"]
        yield f"{title:26}{kl}{end['top1']:8.1%}{end['loss']:9.4f}{state / 1000:10,.0f} kB"
