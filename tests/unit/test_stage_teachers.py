"""Which teacher a single stage learns from, and what is said where there is none."""

import pytest
import tiny

from radlads.checkpoint.weight_files import convert_to_pth
from radlads.recipes.single_stage import train_stage

SIZES = {"model.n_layer": 3, "model.n_embd": 64, "model.head_size": 16, "model.rope.base": 1e6}
SHORT = {"train.my_exit_tokens": 64}


def weights_after(corpus_folder, out, **overrides):
    keys = SHORT | {"train.proj_dir": str(out)} | overrides
    folder = train_stage(tiny.stage_config(corpus_folder, "align", **keys), tiny.Silent()).folder
    return (folder / "model.safetensors").read_bytes()


def test_aligning_without_a_teacher_learns_from_what_the_student_starts_from(teacher, corpus_folder, tmp_path):
    path = tmp_path / "teacher.pth"
    convert_to_pth(teacher, path)
    named = weights_after(corpus_folder, tmp_path / "0", **{"train.teacher.hf_path": str(teacher)})
    assert weights_after(corpus_folder, tmp_path / "1", **SIZES, **{"train.load_model": str(path)}) == named
    assert weights_after(corpus_folder, tmp_path / "2", **{"model.hf_path": str(teacher)}) == named
    assert weights_after(corpus_folder, tmp_path / "3", **{"train.teacher.model.hf_path": str(teacher)}) == named


def test_aligning_an_earlier_stages_student_needs_a_teacher(teacher, corpus_folder, tmp_path):
    weights_after(corpus_folder, tmp_path, **{"train.teacher.hf_path": str(teacher), "train.proj_name": "first"})
    with pytest.raises(ValueError, match="the align stage needs a teacher"):
        weights_after(corpus_folder, tmp_path, **{"train.load_model": str(tmp_path / "first")})


def test_missing_weights_of_a_teacher_are_said_with_the_command_that_makes_them(corpus_folder, tmp_path):
    with pytest.raises(ValueError, match=r"do not exist: make them with `python3 convert_hf_to_pth\.py FOLDER .*pth`"):
        weights_after(corpus_folder, tmp_path, **{"train.teacher.path": str(tmp_path / "none.pth")})


def test_a_size_file_that_takes_the_mixers_place_is_refused(teacher, corpus_folder, tmp_path):
    softmax = {"model.tmix": "qwen2", "train.teacher.hf_path": str(teacher)}
    with pytest.raises(
        ValueError, match=r"^model\.tmix is 'qwen2', so no layer has a mixer to align: .*after the size"
    ):
        weights_after(corpus_folder, tmp_path, **softmax)
    assert not list(tmp_path.iterdir())
