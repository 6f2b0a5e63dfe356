"""Two processes make the steps that one makes of twice the batch, whatever shares the work between them."""

import pytest
import stages
from launch import curve, run
from tolerances import TRAJECTORY_MAX, TRAJECTORY_MEAN

from radlads.checkpoint.model_folder import save_model
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_teacher

MEASURED = {"heldout_tail_tokens": 200, "heldout_tokens": 64, "heldout_every_steps": 3}
STAGES = {
    "align": {},
    "align-accumulated": {"micro_bsz": 2, "accumulate_grad_batches": 2},
    "align-rwkv6": {"mixer": "rad_rwkv6", "micro_bsz": 2, "accumulate_grad_batches": 2} | MEASURED,
    "distill": {"activation_checkpointing": "selective"},
    "distill-accumulated": {"micro_bsz": 2, "accumulate_grad_batches": 2, "activation_checkpointing": "full"},
    "extend": {"trainable": "decay"},
    "distill-documents": {"reset_state_at_eos": 1, "eos_token_id": stages.END},
    "distill-masked": {"mask_labels_at_eos": 1, "eos_token_id": stages.END},
    "instruct": {"on_policy_share": 0.5, "on_policy_max_tokens": 6, "on_policy_temperature": 0.0, "lr_init": 1e-4},
}
IN_SHARDS = ("align", "align-accumulated", "align-rwkv6", "distill", "distill-accumulated", "extend", "instruct")
IN_SHARDS += ("distill-documents",)
COMPILED = ("distill",)
CASES = [(name, "ddp") for name in STAGES if name != "align-rwkv6"] + [(name, "fsdp") for name in IN_SHARDS]
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """The folder of all runs: `one-NAME`, `ddp-NAME` and `fsdp-NAME`."""
    folder = stages.corpus(tmp_path_factory.mktemp("two"))
    whole = [entry(folder, teacher, name, "one") for name in STAGES]
    run(folder, whole)
    nothing = {"keys": softmax_alone(folder, teacher), "fails": True}
    _, err = run(folder, [*(entry(folder, teacher, name, strategy) for name, strategy in CASES), nothing])
    assert err.count("no parameter trains: the student has no recurrent layer") == 2
    return folder


def softmax_alone(folder, teacher):
    """The keys of a stage that trains the recurrent layers of a model that has none."""
    (folder / "softmax").mkdir()
    save_model(build_teacher(open_teacher(teacher)), folder / "softmax")
    own = {"mixer": "qwen2", "trainable": "mixer", "load_model": str(folder / "softmax"), "strategy": "fsdp"}
    return stages.keys(folder, teacher, "extend", "nothing", **own)


@pytest.fixture(scope="module")
def compiled(folder, teacher):
    """The same folder, with runs in shards whose blocks are compiled, as they are on GPUs: `compiled-NAME`."""
    run(folder, [entry(folder, teacher, name, "fsdp", f"compiled-{name}", compile="always") for name in COMPILED])
    return folder


def entry(folder, teacher, name, strategy, called=None, **more):
    stage, settings = name.partition("-")[0], STAGES[name] | more
    if stage != "align":
        settings["load_model"] = str(folder / "one-align")
    if strategy == "one":
        settings |= {"devices": 1, "micro_bsz": 2 * settings.get("micro_bsz", 4)}
    else:
        settings["strategy"] = strategy
    return {"keys": stages.keys(folder, teacher, stage, called or f"{strategy}-{name}", **settings)}


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_the_curves_are_one_processs(folder, name, strategy):
    assert_alike(folder, f"one-{name}", f"{strategy}-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_shards_make_the_same_curves(compiled, name):
    assert_alike(compiled, f"one-{name}", f"compiled-{name}")
    assert curve(compiled, f"compiled-{name}") != curve(compiled, f"fsdp-{name}"), "nothing was compiled"


def assert_alike(folder, one, two):
    for column in ("loss", "grad_norm"):
        expected, found = curve(folder, one, column), curve(folder, two, column)
        drift = [abs(a / b - 1) for a, b in zip(found, expected, strict=True)]
        assert len(drift) == stages.STEPS
        assert max(drift) < TRAJECTORY_MAX
        assert sum(drift) / stages.STEPS < TRAJECTORY_MEAN


def test_the_curves_learn_something(folder):
    assert curve(folder, "one-align")[-1] != curve(folder, "one-align-accumulated")[0]
    for name in ("distill", "distill-accumulated"):
        losses = curve(folder, f"one-{name}")
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5]), "a curve that learns nothing shows nothing"


def test_tokens_are_those_of_all_processes(folder):
    assert curve(folder, "ddp-distill", "tokens") == curve(folder, "one-distill", "tokens")
