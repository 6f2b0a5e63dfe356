"""What a conversion is asked for, and the configurations of its stages: three, and a fourth for instruct models."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files as files_of
from pathlib import Path

from radlads.config.layer_lists import mixer_names
from radlads.config.load import load_config
from radlads.config.schema import Config, ModelConfig
from radlads.convert.shapes import variant_keys, variant_of
from radlads.convert.student import student_config
from radlads.data.python_text import Split
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import DEFAULT, name_mixers, registered_name
from radlads.recipes.demo_recipes import DemoRecipe, recipe_file, recipe_for, recipe_name
from radlads.train.hardware import only_device

STAGES = ("align", "distill", "extend")
INSTRUCT = "instruct"
"""The stage that follows where it is asked for."""
BUNDLED_TEACHER = Path(str(files_of("radlads") / "assets" / "teacher"))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what, and where.

    mixer: any that the registry finds. variant: None = the mixer's first, if it has any. recipe: one of
    demo_recipes.RECIPES; None = the mixer's. tokens_of: the recipe whose budgets it has; None = its own.
    data, heldout_data: .bin/.idx pairs without the extension; None = the text of the running Python, tokenised into
    `out/data`. overrides: dotted configuration keys for all stages. retie: end with the embedding as the head again, as
    a tied teacher has it. instruct: end with stage 4, on the conversations in `chat`, a corpus with a mask; None =
    those that the teacher writes into `out/data`.
    """

    teacher: str | Path = BUNDLED_TEACHER
    mixer: str = DEFAULT
    variant: str | None = None
    recipe: str | None = None
    tokens_of: str | None = None
    out: Path = Path("out/demo")
    data: Path | None = None
    heldout_data: Path | None = None
    overrides: Mapping[str, object] | None = None
    retie: bool = False
    instruct: bool = False
    chat: Path | None = None

    def __post_init__(self) -> None:
        if self.chat is not None and not self.instruct:
            raise ValueError("--chat names conversations for stage 4: give it with --instruct")
        if (self.data is None) != (self.heldout_data is None):
            raise ValueError("--data and --heldout-data go together: name both .bin/.idx pairs, or neither")

    def corpus(self, split: Split) -> Path:
        """Stem of the split's .bin/.idx pair."""
        given = self.data if split == "train" else self.heldout_data
        return given or self.out / "data" / split

    @property
    def conversations(self) -> Path:
        """Stem of the corpus that stage 4 learns from."""
        return self.chat or self.out / "data" / "chat"

    @property
    def stages(self) -> tuple[str, ...]:
        """Its stages, in their order."""
        return (*STAGES, INSTRUCT) if self.instruct else STAGES


def stage_configs(conversion: Conversion) -> dict[str, Config]:
    """The stages' configurations: the mixer's file, the stage's, the variant's keys, then the overrides. A mixer
    without a file has the default mixer's.

    Raises ValueError for an unknown mixer, or a variant the mixer does not have.
    """
    variant = variant_of(conversion.mixer, conversion.variant)
    overrides = dict(conversion.overrides or {})
    if owned := sorted(overrides.keys() & _OWNED_KEYS):
        raise ValueError(f"--set {owned[0]} is not possible: the conversion sets it itself")
    mixer = registered_name(conversion.mixer)
    files = [recipe_file(mixer) if recipe_file(mixer).is_file() else recipe_file(DEFAULT)]
    keys = {"model.tmix": mixer, **variant_keys(mixer, variant)}
    data = {"train.data_file": str(conversion.corpus("train"))}
    data |= {"train.validation_data_file": str(conversion.corpus("heldout"))}
    data |= {"train.teacher.hf_path": str(conversion.teacher), "train.proj_dir": str(conversion.out)}
    chat = {"train.data_file": str(conversion.conversations)}
    device_type = _device_type(overrides)
    recipe = recipe_for(conversion.teacher, device_type, recipe_name(conversion.recipe, mixer))
    budgets = recipe_for(conversion.teacher, device_type, conversion.tokens_of) if conversion.tokens_of else recipe
    configs = {}
    for stage in conversion.stages:
        tokens = load_config([recipe_file(DEFAULT), *budgets.stage_files(stage)], {}).train.my_exit_tokens
        own = keys | data | {"train.my_exit_tokens": tokens} | (chat if stage == INSTRUCT else {})
        configs[stage] = load_config([*files, *recipe.stage_files(stage)], own | overrides)
    name_mixers(*mixer_names(configs["align"].model))
    return configs


def check_aligns(teacher: RadladsConfig, model: ModelConfig) -> None:
    """Raise ValueError for layers or settings of which no student can be made, or none that has a mixer to align."""
    if student_config(teacher, replace(model, mixer={})).recurrent_layers:
        student_config(teacher, model)
        return
    if model.softmax_layers or model.layer_mixers:
        raise ValueError("--set model.softmax_layers and model.layer_mixers leave no mixer to align: name fewer layers")
    raise ValueError("no layer of this student has a mixer to align: choose another --mixer, or fewer softmax layers")


def _device_type(overrides: Mapping[str, object]) -> str:
    """`cuda` or `cpu`: where stages run, by train.accelerator or by what is there."""
    return only_device(load_config([recipe_file("align")], dict(overrides)).train).type


def recipe_of(conversion: Conversion, configs: Mapping[str, Config]) -> DemoRecipe:
    """How much is measured."""
    name = recipe_name(conversion.recipe, conversion.mixer)
    return recipe_for(conversion.teacher, only_device(configs["align"].train).type, name)


_OWNED_KEYS = {
    "train.data_file",
    "train.validation_data_file",
    "train.attention_distillation_stage",
    "train.load_model",
    "train.teacher.path",
    "train.teacher.hf_path",
    "train.teacher.model.hf_path",
    "model.tmix",
}
