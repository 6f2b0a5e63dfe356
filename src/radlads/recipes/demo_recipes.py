"""What `radlads demo` does with the teachers that have a name: budgets, rates, and how much is measured."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from radlads.checkpoint.named_models import NAMED_MODELS

_FILES = Path(str(files("radlads") / "assets" / "recipe"))


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """A demo's files and measurements. folder: below assets/recipe, with files for stages that go on top of the
    bundled teacher's; "" for these alone. heldout_tokens: of each row of the table. decode_positions: where the time
    per token is taken. num_prompts, reply_tokens: how many of our own prompts the teacher answers for stage 4, and how
    long a reply may be."""

    folder: str = ""
    heldout_tokens: int = 65536
    decode_positions: tuple[int, int] = (100, 8000)
    num_prompts: int = 400
    reply_tokens: int = 256

    def stage_files(self, stage: str) -> list[Path]:
        """The stage's files, later ones on top."""
        own = [_FILES / self.folder / f"{stage}.yaml"] if self.folder else []
        return [recipe_file(stage), *own]


_NAMED = {
    ("smollm2", "cpu"): DemoRecipe(
        folder="smollm2_cpu", heldout_tokens=4096, decode_positions=(100, 1000), num_prompts=48, reply_tokens=96
    ),
    ("smollm2", "cuda"): DemoRecipe(folder="smollm2_gpu", num_prompts=1_832),
}
assert {name for name, _ in _NAMED} == set(NAMED_MODELS)


def recipe_file(name: str) -> Path:
    """A file below assets/recipe: a mixer's, a variant's or a stage's."""
    return _FILES / f"{name}.yaml"


def recipe_for(teacher: str | Path, device_type: str) -> DemoRecipe:
    """The recipe for a teacher on a `cpu` or `cuda` device; the bundled teacher's for one that has no name."""
    return _NAMED.get((str(teacher), device_type), DemoRecipe())
