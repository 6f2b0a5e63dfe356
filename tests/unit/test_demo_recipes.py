"""Which student `radlads demo` makes, and by which files and budgets."""

import pytest

from radlads.recipes.comparison import check_comparable, comparison_lines
from radlads.recipes.demo_recipes import RECIPES, recipe_for, recipe_name
from radlads.recipes.stage_configs import STAGES, Conversion, stage_configs


@pytest.fixture(scope="module")
def configs():
    return {name: stage_configs(Conversion(recipe=name)) for name in RECIPES}


def test_our_mixers_get_a_window_and_others_the_papers_stages():
    assert recipe_name(None, "rad_rwkv7") == recipe_name(None, "rad_rwkv6") == "window"
    assert recipe_name(None, "qwen2") == "paper"
    assert recipe_name("paper", "rad_rwkv7") == "paper"
    with pytest.raises(ValueError, match="choose window or paper"):
        recipe_name("best", "rad_rwkv7")
    with pytest.raises(ValueError, match="needs a mixer with a softmax window, which qwen2 has not: use paper"):
        recipe_name("window", "qwen2")


def test_only_the_window_recipe_has_a_window_and_its_last_stage_the_teacher(configs):
    for name, stages in configs.items():
        windows = {config.model.mixer.get("window_tokens", 0) for config in stages.values()}
        assert windows == ({192} if name == "window" else {0})
        assert all(config.model.gate_rank_type == 2 for config in stages.values())
        weights = {stage: (c.train.teacher.kl_weight, c.train.teacher.ce_weight) for stage, c in stages.items()}
        assert weights["extend"] == ((1.0, 0.0) if name == "window" else (0.0, 1.0))


def test_the_gate_beside_a_window_begins_nearly_silent_for_every_mixer():
    gates = [
        stage_configs(Conversion(mixer="rad_rwkv6", recipe=name))["align"].model.gate_rank_type for name in RECIPES
    ]
    assert gates == [2, 1]


def test_a_named_teachers_own_files_are_on_top():
    paths = [path.parent.name for path in recipe_for("smollm2", "cpu", "window").stage_files("align")]
    assert paths == ["recipe", "smollm2_cpu", "window", "window", "smollm2_cpu", "smollm2_cpu"]
    assert recipe_for("smollm2", "cpu", "window").heldout_tokens == recipe_for("smollm2", "cpu", "paper").heldout_tokens
    for device in ("cpu", "cuda"):
        budgets = [stage_configs(Conversion(teacher="smollm2", recipe=name, overrides=on(device))) for name in RECIPES]
        assert all(each["align"].train.my_exit_tokens < 10**7 for each in budgets)


def on(device):
    return {"train.accelerator": "cpu" if device == "cpu" else "auto"}


def test_one_recipe_can_have_the_budgets_of_another(configs):
    short = stage_configs(Conversion(recipe="paper", tokens_of="window"))
    for stage in STAGES:
        tokens, rates = short[stage].train.my_exit_tokens, short[stage].train.lr_init
        assert tokens == configs["window"][stage].train.my_exit_tokens
        assert rates == configs["paper"][stage].train.lr_init
    assert not short["align"].model.mixer
    override = {"train.my_exit_tokens": 512}
    assert stage_configs(Conversion(overrides=override))["align"].train.my_exit_tokens == 512


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "paper"}, "leave out --recipe paper"),
        ({"mixer": "qwen2"}, "leave out --recipe paper"),
        ({"overrides": {"model.softmax_layers": "1"}}, "leave out --set model.softmax_layers"),
    ],
)
def test_comparisons_that_would_compare_nothing_are_refused(settings, message):
    check_comparable(Conversion())
    with pytest.raises(ValueError, match=message):
        check_comparable(Conversion(**settings))


def test_the_comparison_is_a_table():
    stage = {"kl": 0.25, "loss": 2.5, "top1": 0.75}
    summary = dict.fromkeys(STAGES, stage) | {"bytes": {"student": {"8192": 262144}}}
    head, row = comparison_lines({"window": summary})
    assert head.split()[-5:] == ["top-1", "loss", "state", "at", "8k"]
    assert row.split() == ["window", *["0.2500"] * 3, "75.0%", "2.5000", "262", "kB"]
