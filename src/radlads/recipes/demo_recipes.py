"""What `radlads demo` does: which student, with which budgets and rates, and how much is measured."""

from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from radlads.checkpoint.named_models import NAMED_MODELS
from radlads.model.registry import mixer_class
from radlads.model.window import WindowSettings

_FILES = Path(str(files("radlads") / "assets" / "recipe"))
RECIPES = ("window", "paper")
"""A student with a softmax window in every layer, which stays close to its teacher; the paper's student and stages."""


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """A demo's files and measurements.

    folders: below assets/recipe, whose files (student.yaml for all stages, and the stage's) go on top of the bundled
    teacher's, later ones on top.
    heldout_tokens: of each row of the table. decode_positions: where the time per token is taken.
    num_prompts, reply_tokens: how many of our own prompts the teacher answers for stage 4, and how long a reply may be.
    """

    folders: tuple[str, ...] = ()
    heldout_tokens: int = 65536
    decode_positions: tuple[int, int] = (100, 8000)
    num_prompts: int = 400
    reply_tokens: int = 256

    def stage_files(self, stage: str) -> list[Path]:
        """The stage's files, later ones on top."""
        own = [_FILES / folder / f"{name}.yaml" for folder in self.folders for name in ("student", stage)]
        return [recipe_file(stage), *(path for path in own if path.is_file())]


_NAMED = {
    ("smollm2", "cpu"): DemoRecipe(
        folders=("smollm2_cpu",), heldout_tokens=4096, decode_positions=(100, 1000), num_prompts=48, reply_tokens=96
    ),
    ("smollm2", "cuda"): DemoRecipe(folders=("smollm2_gpu",), num_prompts=1_832),
}
assert {name for name, _ in _NAMED} == set(NAMED_MODELS)
_OTHERS = {"cpu": DemoRecipe(heldout_tokens=16384), "cuda": DemoRecipe()}


def recipe_file(name: str) -> Path:
    """A file below assets/recipe: a mixer's, a variant's or a stage's."""
    return _FILES / f"{name}.yaml"


def recipe_name(wanted: str | None, mixer: str) -> str:
    """The recipe that is asked for; with None, window where the mixer can have one, else paper.

    Raises ValueError for an unknown recipe, or a window in a mixer that has none.
    """
    if wanted not in (None, *RECIPES):
        raise ValueError(f"there is no recipe {wanted!r}: choose {' or '.join(RECIPES)}")
    has_window = issubclass(mixer_class(mixer).Settings, WindowSettings)
    if wanted == "window" and not has_window:
        raise ValueError(f"--recipe window needs a mixer with a softmax window, which {mixer} has not: use paper")
    return wanted or ("window" if has_window else "paper")


def recipe_for(teacher: str | Path, device_type: str, name: str) -> DemoRecipe:
    """The recipe of this name for a teacher on a `cpu` or `cuda` device; the bundled one's for one without a name."""
    found = _NAMED.get((str(teacher), device_type), _OTHERS[device_type])
    if name == "paper":
        return found
    return replace(found, folders=(*found.folders, name, *(f"{name}/{folder}" for folder in found.folders)))
