"""Going on with a stage at a checkpoint: as if it had never stopped, and never with another run's."""

import json
import os
import random
import shutil
import signal
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from radlads.checkpoint.atomic import unfinished_folder
from radlads.checkpoint.model_folder import load_model
from radlads.checkpoint.own_files import MARK
from radlads.checkpoint.weights import SafetensorsFolder
from radlads.checksums import sha256
from radlads.config.compare import differences
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.recipes import conversion
from radlads.train import checkpointing, stopping
from radlads.train.checkpoints import snapshots
from radlads.train.checkpoints.resume import describe_run, first_checkpoint
from radlads.train.corpora.run_corpora import corpus_differences, describe_corpora
from radlads.train.engines.single import SingleProcess
from radlads.train.fit import run_stage
from radlads.train.lightning_module import StageModule
from radlads.train.logging.metrics_csv import MetricsCsv

SIX_STEPS = {"my_exit_tokens": 16 * 2 * 6, "micro_bsz": 1, "accumulate_grad_batches": 2}
CHECKPOINTS = {"checkpoint_every_steps": 1, "keep_checkpoints": 3}


def config_of(data, stage="align", **overrides):
    keys = SIX_STEPS | {"validation_data_file": str(data / "heldout"), "heldout_tokens": 64} | overrides
    return tiny.stage_config(data, stage, **{f"train.{key}": value for key, value in keys.items()})


def run(teacher, config, folder):
    """Run the stage, or go on with it, from fixed random numbers; returns what the console was told."""
    source, console = open_teacher(teacher), tiny.Silent()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, console, parent="test")
    return console.lines


@contextmanager
def signal_in_step(step, signum=signal.SIGTERM):
    """Send this process a signal while it computes a step."""
    earlier = StageModule.training_step

    def training_step(self, tokens, batch_idx):
        if self.steps_done == step - 1 and batch_idx % 2 == 0:
            os.kill(os.getpid(), signum)
        return earlier(self, tokens, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        yield


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


@pytest.fixture(scope="module")
def straight(teacher, corpus_folder, tmp_path_factory):
    """The align stage run without a stop."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(teacher, config_of(corpus_folder), folder)
    return folder


@pytest.fixture(scope="module")
def stopped_once(teacher, corpus_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with signal_in_step(4), pytest.raises(stopping.Stopped):
        run(teacher, config_of(corpus_folder, **CHECKPOINTS), folder)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The name of an align stage whose unfinished run stopped after step 4, with checkpoints of steps 2, 3 and 4."""
    shutil.copytree(stopped_once.with_name("run.partial"), tmp_path / "run.partial")
    return tmp_path / "run"


def held(folder):
    return snapshots.checkpoints_in(folder.with_name("run.partial"))


def described(folder):
    """What the run of an unfinished stage says of itself."""
    return json.loads((held(folder)[0] / "run.json").read_text())


def first(folder, setting="auto", **changes):
    console = tiny.Silent()
    return first_checkpoint(setting, folder.with_name("run.partial"), described(folder) | changes, console), console


def assert_same(folder, expected):
    for name in ("model.safetensors", "metrics.csv", "heldout.csv"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("distill", {"optimizer": "muon", "heldout_every_steps": 2, "weight_decay": 0.1}),
        ("extend", {"precision": "bf16-true", "warmup_steps": 5, "lr_decay_type": "linear"}),
    ],
)
def test_a_stopped_run_ends_as_one_that_never_stopped(teacher, corpus_folder, tmp_path, stage, overrides):
    config, folder = config_of(corpus_folder, stage, **overrides), tmp_path / "run"
    run(teacher, config, tmp_path / "straight")
    numbers = drawn()
    with signal_in_step(4), pytest.raises(stopping.Stopped):
        run(teacher, config, folder)
    lines = run(teacher, config, folder)
    assert any("going on after step 4 of 6" in line for line in lines)
    assert drawn() == numbers
    assert_same(folder, tmp_path / "straight")
    assert not (folder / "checkpoints").exists()
    facts = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("straight", "run")]
    assert facts[0]["tokens"] == facts[1]["tokens"]
    straight, resumed = (each["sha256"] for each in facts)
    assert straight.pop("speed.csv") and resumed.pop("speed.csv") and straight == resumed


@pytest.mark.parametrize("forgotten", ["restore_optimizers", None])
def test_it_takes_the_optimisers_to_end_the_same(teacher, corpus_folder, straight, stopped, monkeypatch, forgotten):
    if forgotten:
        monkeypatch.setattr(SingleProcess, forgotten, lambda *arguments: None)
    run(teacher, config_of(corpus_folder), stopped)
    same = (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert same is not bool(forgotten)


def test_a_checkpoint_is_a_model_folder_and_holds_no_teacher(stopped):
    folder = held(stopped)[-1]
    model = load_model(folder)
    assert {path.name for path in folder.iterdir()} >= {"run.json", "position.json", "metrics.csv", "manifest.json"}
    stored = SafetensorsFolder(folder / "state.safetensors")
    moments = sum(stored.info(name).num_bytes for name in stored if ":exp_avg" in name)
    assert moments == 2 * 4 * sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) < 4 * model.num_parameters() + moments + 50_000


def test_the_newest_are_kept(stopped):
    assert [path.name for path in held(stopped)] == ["step-000002", "step-000003", "step-000004"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_a_checkpoint(teacher, corpus_folder, tmp_path, signum):
    before = signal.getsignal(signum)
    with signal_in_step(1, signum), pytest.raises(stopping.Stopped) as caught:
        run(teacher, config_of(corpus_folder), tmp_path / "run")
    assert caught.value.code == 128 + signum
    assert [path.name for path in held(tmp_path / "run")] == ["step-000001"]
    assert signal.getsignal(signum) is before


def test_a_second_ctrl_c_stops_at_once():
    with stopping.StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_last_step_lets_the_stage_finish(teacher, corpus_folder, straight, stopped):
    with signal_in_step(6), pytest.raises(stopping.Stopped):
        run(teacher, config_of(corpus_folder), stopped)
    assert_same(stopped, straight)


def test_checkpoints_are_due_by_steps_and_by_minutes(tmp_path):
    now, train = [0.0], SimpleNamespace(checkpoint_every_steps=4, checkpoint_every_minutes=2.0)
    each = checkpointing.Checkpointing(
        train, tmp_path, {}, stopping.StopRequests(), tiny.Silent(), clock=lambda: now[0]
    )
    module = SimpleNamespace(wants_checkpoint=None)
    each.on_train_start(SimpleNamespace(optimizers=[]), module)
    assert [step for step in range(1, 10) if each.is_due_by_steps(step)] == [4, 8]
    assert not module.wants_checkpoint()
    now[0] = 120.0
    assert module.wants_checkpoint()
    train.checkpoint_every_minutes = train.checkpoint_every_steps = 0
    assert not each.is_due_by_steps(4) and not module.wants_checkpoint()


def test_a_step_that_is_not_finite_reaches_no_checkpoint(tmp_path):
    """On a GPU the newest step is not read yet when a checkpoint is due."""

    def read_steps():
        raise ValueError("the loss is nan")

    train = SimpleNamespace(checkpoint_every_steps=1, checkpoint_every_minutes=0)
    each = checkpointing.Checkpointing(train, tmp_path, {}, stopping.StopRequests(), tiny.Silent())
    with pytest.raises(ValueError, match="the loss is nan"):
        each._write(None, SimpleNamespace(reader=SimpleNamespace(read=read_steps)))
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_is_refused_with_all_that_differs(teacher, corpus_folder, stopped):
    with pytest.raises(ValueError) as caught:
        changes = {"lr_init": 2e-3, "beta2": 0.95, "proj_dir": "elsewhere", "keep_checkpoints": 7}
        run(teacher, config_of(corpus_folder, **changes), stopped)
    assert "(train.beta2 is 0.99 there and 0.95 here; train.lr_init is 0.001 there and 0.002 here)" in str(caught.value)
    assert len(held(stopped)) == 3


def test_what_only_saves_memory_may_be_another(teacher, corpus_folder, straight, stopped):
    less = {"micro_bsz": 2, "accumulate_grad_batches": 1, "activation_checkpointing": "full", "cuda_graphs": "never"}
    assert any("going on after step 4" in line for line in run(teacher, config_of(corpus_folder, **less), stopped))
    found, expected = (load_file(folder / "model.safetensors") for folder in (stopped, straight))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_another_student_teacher_or_corpus_is_another_run(teacher, corpus_folder, tmp_path):
    def description(teacher, corpus):
        torch.manual_seed(0)
        source, config = open_teacher(teacher), config_of(corpus_folder)
        corpora = [(BinIdxReader(corpus), Fraction(1))]
        return describe_run(config, build_student(source, config.model)[0], build_teacher(source), corpora)

    present = description(teacher, corpus_folder / "train")
    assert differences(present, description(teacher, corpus_folder / "train")) == []
    other = description(tiny.teacher_folder(tmp_path / "other", tied=True), corpus_folder / "train")
    assert [text.split(" is ")[0] for text in differences(present, other)] == ["student at the start", "teacher"]
    other = description(teacher, tiny.corpus(tmp_path / "train", num_tokens=20_020))
    assert [text.split(" is ")[0] for text in differences(present, other)] == ["training tokens"]


@pytest.mark.parametrize(
    ("num_tokens", "keys", "expected"),
    [
        (20_000, {}, set()),
        (20_000, {"train.my_exit_tokens": 6 * 64 - 1}, set()),
        (20_000, {"train.my_exit_tokens": 6 * 64 + 1}, {"optimizer steps"}),
        (960, {}, {"magic primes"}),  # 60 contexts: 59, and 53 by the older rule
        (960, {"train.magic_prime": 53}, set()),
        (20_000, {"model.preserve_last_n_layers": 1}, {"softmax layers"}),
        (20_000, {"model.balance_state": 1, "model.groupnorm_att": 1}, {"scale of RAD-RWKV7"}),
    ],
)
def test_what_earlier_versions_decided_otherwise_marks_a_run(teacher, tmp_path, num_tokens, keys, expected):
    corpus = tiny.corpus(tmp_path / "train", num_tokens=num_tokens)
    config = tiny.stage_config(tmp_path, "distill", **{"train.my_exit_tokens": 6 * 64, **keys})
    student = build_student(open_teacher(teacher), config.model)[0]
    run = describe_run(config, student, None, [(BinIdxReader(corpus), Fraction(1))])
    assert run.keys() & {"optimizer steps", "magic primes", "softmax layers", "scale of RAD-RWKV7"} == expected


@pytest.mark.parametrize("key", ["data_file", "validation_data_file"])
def test_a_corpus_of_the_same_index_is_told_apart_and_both_are_named(teacher, corpus_folder, tmp_path, stopped, key):
    was = corpus_folder / {"data_file": "train", "validation_data_file": "heldout"}[key]
    tokens = BinIdxReader(was).num_tokens
    other = tiny.corpus(tmp_path / "other", num_tokens=tokens, seed=9)
    assert other.with_suffix(".idx").read_bytes() == was.with_suffix(".idx").read_bytes()
    with pytest.raises(ValueError) as caught:
        run(teacher, config_of(corpus_folder, **{key: str(other)}), stopped)
    assert f"different run (train.{key} is {was} ({tokens} " in str(caught.value)
    assert f" there and {other} ({tokens} " in str(caught.value) and str(caught.value).count("samples") == 2
    assert len(held(stopped)) == 3


def test_corpora_that_were_moved_are_the_same(teacher, corpus_folder, tmp_path, straight, stopped):
    moved = shutil.copytree(corpus_folder, tmp_path / "moved")
    keys = {"data_file": str(moved / "train"), "validation_data_file": str(moved / "heldout")}
    assert any("going on after step 4" in line for line in run(teacher, config_of(corpus_folder, **keys), stopped))
    assert_same(stopped, straight)


def test_a_corpus_of_a_mixture_is_told_apart(tmp_path):
    a, b, c = (BinIdxReader(tiny.corpus(tmp_path / name, seed=seed)) for seed, name in enumerate("abc"))
    shares = [Fraction(9, 10), Fraction(1, 10)]
    present = describe_corpora(zip([a, b], shares, strict=True), None)
    assert corpus_differences(present, describe_corpora(zip([a, b], shares, strict=True), None)) == []
    (phrase,) = corpus_differences(present, describe_corpora(zip([a, c], shares, strict=True), None))
    assert phrase.startswith(f"train.data_file is {tmp_path}/a:9/10 (20000 uint16 tokens, ")
    assert f" there and {tmp_path}/a:9/10 (" in phrase and f"{tmp_path}/c:1/10 (" in phrase


def test_a_heldout_corpus_may_be_added_but_not_taken_away(tmp_path):
    corpus = BinIdxReader(tiny.corpus(tmp_path / "a"))
    without, with_ = (describe_corpora([(corpus, Fraction(1))], heldout) for heldout in (None, corpus))
    assert corpus_differences(without, with_) == []
    assert corpus_differences(with_, without)[0].endswith("there and not set here")


def test_a_checkpoint_older_than_the_hash_of_samples_is_gone_on_with(stopped):
    run_is, newest = described(stopped), held(stopped)[-1]
    corpus = run_is["training tokens"][0]
    old = {key: value for key, value in run_is.items() if key != "held-out tokens"}
    old["training tokens"] = f"1 of {corpus['tokens']} tokens, index {corpus['index']}"
    rewrite_run(newest, old)
    assert first(stopped)[0] == newest
    rewrite_run(newest, old | {"training tokens": "1 of 7 tokens, index 0123456789abcdef"})
    with pytest.raises(ValueError, match=r"data_file is 1 of 7 tokens, index 0123456789abcdef there and /.*train \("):
        first_checkpoint("auto", stopped.with_name("run.partial"), run_is, tiny.Silent())


def rewrite_run(checkpoint, content):
    """Give a checkpoint another run.json, and its manifest that file's hash."""
    (checkpoint / "run.json").write_text(json.dumps(content))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"]["run.json"] = sha256(checkpoint / "run.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_never_starts_over_and_says_so(stopped):
    chosen, console = first(stopped, "never")
    assert chosen is None
    assert console.lines == [f"{stopped}.partial: an unfinished run (3 checkpoints) is thrown away and started over"]
    assert [path.name for path in stopped.with_name("run.partial").iterdir()] == [MARK]


@pytest.mark.parametrize("mine", ["notes.txt", "checkpoints/step-000003/notes.txt", "checkpoints/best/run.json"])
def test_a_run_is_not_thrown_away_with_files_of_its_user(stopped, mine):
    path = stopped.with_name("run.partial") / mine
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(ValueError, match=f"{mine} is in the way, and no run wrote it"):
        first(stopped, "never")
    assert len(held(stopped)) == 3 and path.exists()


def test_linked_checkpoints_are_refused(stopped, tmp_path):
    run_is, checkpoints = described(stopped), stopped.with_name("run.partial") / "checkpoints"
    checkpoints.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "step-000004").rename(tmp_path / "elsewhere" / "step-000004.partial")
    checkpoints.symlink_to(tmp_path / "elsewhere")
    for setting in ("auto", "never"):
        with pytest.raises(ValueError, match="checkpoints is a symbolic link"):
            first_checkpoint(setting, checkpoints.parent, run_is, tiny.Silent())
    assert len(list((tmp_path / "elsewhere").iterdir())) == 3


def test_an_old_checkpoint_with_files_of_its_user_stays_and_the_run_goes_on(teacher, corpus_folder, straight, stopped):
    (held(stopped)[0] / "notes.txt").write_text("mine")
    lines = run(teacher, config_of(corpus_folder, **CHECKPOINTS), stopped)
    assert any("step-000002 stays: " in line and "notes.txt is in the way" in line for line in lines)
    assert (stopped / "checkpoints" / "step-000002" / "notes.txt").read_text() == "mine"
    assert_same(stopped, straight)


def test_a_folder_without_a_mark_is_not_started_over(teacher, corpus_folder, tmp_path):
    model = tmp_path / "run.partial" / "model.safetensors"
    model.parent.mkdir()
    model.write_text("a model of mine")
    with pytest.raises(ValueError, match=r"run\.partial is in the way, and nothing in it says that radlads wrote it"):
        run(teacher, config_of(corpus_folder), tmp_path / "run")
    assert model.read_text() == "a model of mine"


def test_a_named_checkpoint_is_gone_on_with_and_newer_ones_go(teacher, corpus_folder, straight, stopped):
    lines = run(teacher, config_of(corpus_folder, resume=str(held(stopped)[0])), stopped)
    assert any("after step 2 of 6" in line for line in lines)
    assert sum("is removed" in line for line in lines) == 2
    assert_same(stopped, straight)


def test_a_checkpoint_from_elsewhere_starts_a_folder(teacher, corpus_folder, tmp_path, straight, stopped):
    shutil.copytree(held(stopped)[1], tmp_path / "copied")
    run(teacher, config_of(corpus_folder, resume=str(tmp_path / "copied")), tmp_path / "new")
    assert_same(tmp_path / "new", straight)
    with pytest.raises(ValueError, match="holds checkpoints of its own"):
        first(stopped, str(tmp_path / "copied"))
    with pytest.raises(ValueError, match="is not a checkpoint's folder: name one, or auto, or never"):
        first(stopped, str(tmp_path / "nowhere"))


def test_a_checkpoint_that_was_renamed_is_not_thrown_away(stopped):
    run_is, (*earlier, newest) = described(stopped), held(stopped)
    for each in earlier:
        shutil.rmtree(each)
    renamed = newest.rename(newest.with_name("best"))
    with pytest.raises(ValueError, match="is not named step-NUMBER"):
        first_checkpoint(str(renamed), stopped.with_name("run.partial"), run_is, tiny.Silent())
    assert (renamed / "manifest.json").is_file()


def test_a_named_checkpoint_may_go_on_with_another_rate_or_compiled_otherwise(stopped):
    named = held(stopped)[-1]
    chosen, console = first(stopped, str(named), **{"train.lr_init": 5e-4, "train.compile": "never"})
    assert chosen == named
    assert console.lines == [
        "from step-000004 on: train.compile is 'auto' there and 'never' here",
        "from step-000004 on: train.lr_init is 0.001 there and 0.0005 here",
    ]
    with pytest.raises(ValueError, match=r"different run \(sequences in a step is 2 there and 4 here\)"):
        first(stopped, str(named), **{"sequences in a step": 4})


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(stopped, name, harm):
    second, newest = held(stopped)[1:]
    content = (newest / name).read_bytes()
    (newest / name).unlink()
    if harm != "gone":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (newest / name).write_bytes(content[:middle] + (flipped if harm == "flip" else b""))
    with pytest.raises(ValueError) as caught:
        first(stopped)
    assert f"the checkpoint {newest} cannot be used, as its " in str(caught.value)
    assert name in str(caught.value) or (name, harm) == ("manifest.json", "flip")
    assert f"--train.resume {second} " in str(caught.value)
    assert len(held(stopped)) == 3


def test_where_no_checkpoint_is_whole_starting_over_is_offered(stopped):
    for path in held(stopped):
        (path / "state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"start over with --train\.resume never"):
        first(stopped)


def test_two_processes_do_not_share_a_stage(teacher, corpus_folder, stopped):
    refused = pytest.raises(ValueError, match=r"run\.partial is being written by another process")
    with unfinished_folder(stopped, keep_earlier=True), refused:
        run(teacher, config_of(corpus_folder), stopped)
    assert (stopped / "checkpoints").exists()


def test_metrics_go_on_after_the_rows_that_are_there(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCsv(path).log_metrics({"loss": 1.5, "b": 2.0})
    later = MetricsCsv(path)
    later.log_metrics({"loss": 0.1 + 0.2, "b": 3.0})
    later.log_metrics({"loss": 1.0, "a": 4.0})
    assert path.read_text().split() == ["a,b,loss", ",2.0,1.5", ",3.0,0.30000000000000004", "4.0,,1.0"]


def test_a_demos_mistyped_checkpoint_is_no_auto(tmp_path):
    config = tiny.stage_config(tmp_path, "align", **{"train.resume": str(tmp_path / "step-7")})
    with pytest.raises(ValueError, match="step-7 is not a checkpoint's folder"):
        conversion.with_own_checkpoint(config, tmp_path / "1-align")


def test_no_optimisers_state_is_moved_to_the_host(teacher, corpus_folder, tmp_path, monkeypatch):
    """Lightning moves what it finds when a run ends: 60 GB of fp32 moments at 7B, by count."""
    moved = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.strategy._optimizers_to_device",
        lambda optimizers, device: moved.append(sum(len(each.state) for each in optimizers)),
    )
    with signal_in_step(4), pytest.raises(stopping.Stopped):
        run(teacher, config_of(corpus_folder), tmp_path / "run")
    run(teacher, config_of(corpus_folder), tmp_path / "run")
    assert moved == [0, 0, 0, 0], "as a run begins and as it ends"
