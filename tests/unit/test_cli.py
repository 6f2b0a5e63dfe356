"""Exit codes and sentences of the command line."""

import pytest
import tiny

from radlads.checkpoint.hf_export import export
from radlads.cli import main
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    student, _ = build_student(open_teacher(teacher), tiny.stage_config(folder, "align").model)
    export(student, teacher, folder / "hf")
    return folder / "hf"


def failing(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("radlads: ")
    assert error.count("\n") == 1
    return error


def test_generate_streams_a_repeatable_text(exported, capsys):
    texts = []
    for _ in range(2):
        assert main(["generate", str(exported), "--prompt", "import os", "--max-tokens", "20", "--seed", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "\n"


def test_train_runs_a_stage(teacher, corpus_folder, tmp_path, capsys):
    (tmp_path / "stage.yaml").write_text(
        "model: {ctx_len: 16, tmix: rad_rwkv6}\n"
        "train: {attention_distillation_stage: 1, micro_bsz: 4, my_exit_tokens: 128,\n"
        "        precision: fp32, accelerator: cpu}\n"
    )
    where = ["--train.proj_dir", tmp_path / "out", "--train.data_file", corpus_folder / "train"]
    argv = ["train", "-c", tmp_path / "stage.yaml", *where, "--train.teacher.hf_path", teacher]
    assert main([str(word) for word in argv]) == 0
    folder = tmp_path / "out" / "L3-D64-rad_rwkv6_qwen2-0"
    assert f"wrote {folder}" in capsys.readouterr().out
    other = [
        "train",
        *where,
        "--train.load_model",
        folder,
        "--train.teacher.hf_path",
        teacher,
        "--model.tmix",
        "qwerky7",
    ]
    assert "3 x rad_rwkv6, but the configuration names 3 x rad_rwkv7" in failing(capsys, *other)
    second = ["train", "-c", tmp_path / "stage.yaml", *where, "--train.load_model", folder]
    stage_3 = ["--train.attention_distillation_stage", "-1", "--train.proj_suffix", "3"]
    assert main([str(word) for word in [*second, *stage_3]]) == 0


def test_what_is_wrong_is_said_before_models_are_read(exported, teacher, corpus_folder, tmp_path, capsys, monkeypatch):
    def read(*arguments):
        raise AssertionError("models are read")

    for reader in ("build_models", "weights_hash"):
        monkeypatch.setattr(f"radlads.recipes.single_stage.{reader}", read)
    monkeypatch.setattr("radlads.recipes.conversion.build_teacher", read)
    (tmp_path / "old").mkdir()
    keys = {
        "attention_distillation_stage": 1,
        "teacher.hf_path": teacher,
        "data_file": corpus_folder / "train",
        "proj_dir": tmp_path,
        "proj_name": "old",
        "load_model": exported,
    }
    argv = ["train", *(f"--train.{key}={value}" for key, value in keys.items())]
    assert "old exists already" in failing(capsys, *argv, "--train.accelerator", "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_gpu = ["--train.proj_name", "other", "--train.accelerator", "gpu"]
    assert "no CUDA GPU is here" in failing(capsys, *argv, *on_gpu)
    assert "no CUDA GPU is here" in failing(capsys, "demo", "--out", tmp_path / "new", "--set", "train.accelerator=gpu")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--train.attention_distillation_stage", "2"], "--train.load_model"),
        (["train", "--train.attention_distillation_stage", "1"], "needs a teacher"),
        (["train", "--train.lr_int", "1"], "did you mean 'train.lr_init'"),
        (["train", "-c", "/no/such.yaml"], "/no/such.yaml"),
        (["demo", "--teacher", "./nowhere"], "is no folder, GGUF file, named model"),
        (["demo", "--mixer", "mamba"], "no mixer named 'mamba': use one of qwen2, rad_rwkv6, rad_rwkv7"),
        (["demo", "--mixer", "rad_rwkv6", "--variant", "group_norm"], "belongs to --mixer rad_rwkv7"),
        (["demo", "--variant", "tall"], "--variant must be one of balanced, group_norm, not 'tall'"),
        (["demo", "--mixer", "qwen2"], "no layer of this student has a mixer to align"),
        (["demo", "--recipe", "best"], "there is no recipe 'best': choose window or paper"),
        (["demo", "--compare", "--recipe", "paper"], "leave out --recipe paper"),
        (["demo", "--compare", "--set", "model.softmax_layers=1"], "leave out --set model.softmax_layers"),
        (["demo", "--set", "train.micro_bsz"], "KEY=VALUE"),
        (["demo", "--set", "train.micro_bz=1"], "did you mean 'train.micro_bsz'"),
        (["demo", "--data", "x"], "go together"),
        (["demo", "--set", "train.data_file=x"], "the conversion sets it itself"),
        (["demo", "--set", "train.teacher.model.hf_path=x"], "the conversion sets it itself"),
        (["generate", "/no/such/folder", "--prompt", "a"], "no config.json"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *argv)


def test_an_empty_prompt_is_a_sentence(exported, capsys):
    assert "prompt is empty" in failing(capsys, "generate", exported, "--prompt", "")


def test_a_folder_with_something_else_is_not_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert "holds no conversion" in failing(capsys, "demo", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("argv", [[], ["--help"], ["demo", "--help"], ["train", "--help"], ["generate", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_a_bug_of_ours_shows_its_traceback(monkeypatch, exported):
    monkeypatch.setattr("radlads.inference.generate.stream_text", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(exported), "--prompt", "a"])
