"""Hashes beside models: what is compared when, `radlads verify`, and exports that make way for newer ones."""

import json
import shutil

import pytest
import tiny
from root_scripts import largest_file

from radlads.checkpoint.hf_export import export, remove_export
from radlads.checkpoint.manifest import read_manifest, write_manifest
from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.own_files import MARK
from radlads.checkpoint.published_export import convert_to_published
from radlads.checkpoint.weight_files import convert_to_pth, convert_to_safetensors
from radlads.checksums import write_checksums
from radlads.cli import main
from radlads.convert.blueprint import stored_blueprint
from radlads.recipes.conversion_folder import claim_folder
from radlads.recipes.teacher_record import check_teacher, record_teacher, teacher_checksums

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    return tiny.moved_student(teacher, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def exported(student, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(student, teacher, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """An export of the test's own."""
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.fixture
def stage(student, tmp_path):
    """As much of a finished stage as its hashes are of."""
    folder = tmp_path / "1-align"
    folder.mkdir()
    save_model(student, folder)
    (folder / "metrics.csv").write_text("step,loss\n1,2.5\n")
    write_manifest(folder, stage="align", parent="test", recipe="0", tokens=1, seconds=1.0)
    return folder


def flip(path, position=-5):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def verify(capsys, path):
    capsys.readouterr()
    code = main(["verify", str(path)])
    said = capsys.readouterr()
    return code, [line for line in (said.out + said.err).splitlines() if not line.startswith("reading ")]


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"use_rope": True}, {"rope_theta": 7.0}])
def test_a_finished_stages_edited_configuration_is_refused(stage, change):
    edit(stage / "config.json", **change)
    for read in (read_manifest, load_model, stored_blueprint):
        with pytest.raises(ValueError, match=r"config\.json is not the file its manifest\.json describes .*: run the"):
            read(stage)


def test_a_stage_that_has_hashes_of_its_weights_alone_loads(stage):
    hashes = json.loads((stage / "manifest.json").read_text())["sha256"]
    edit(stage / "manifest.json", sha256={WEIGHTS: hashes[WEIGHTS]}, bytes={})
    edit(stage / "config.json", rms_norm_eps=1e-3)
    assert load_model(stage).config.rms_norm_eps == 1e-3


def test_checksums_are_of_all_that_an_export_writes(folder):
    described = json.loads((folder / "checksums.json").read_text())["sha256"]
    assert {path.name for path in folder.iterdir()} == {*described, "checksums.json"}
    assert {"config.json", WEIGHTS, "modeling.py", "tokenizer.json"} <= described.keys()


def test_an_exports_edited_configuration_is_refused_with_what_to_do(folder):
    edit(folder / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"hf/config\.json is not .*, or remove checksums\.json if you changed it on"):
        load_model(folder)
    (folder / "checksums.json").unlink()
    assert load_model(folder).config.rms_norm_eps == 1e-3


def test_a_flipped_bit_of_an_export_is_seen_where_every_byte_is_compared(folder):
    flip(folder / WEIGHTS)
    load_model(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file .* \(its SHA-256 is another one\)"):
        load_model(folder, verify=True)


def test_weights_of_another_size_are_refused(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match=r"model\.safetensors is not .* \(it has \d+ bytes, and had \d+\)"):
        load_model(folder)


def test_a_fetched_model_loads_without_the_files_that_were_not_fetched(folder):
    for path in [*folder.glob("*.py"), folder / "generation_config.json"]:
        path.unlink()
    load_model(folder, verify=True)


def test_generate_compares_every_byte_where_asked(folder, capsys):
    flip(folder / WEIGHTS)
    argv = ["generate", str(folder), "--prompt", "a", "--max-tokens", "1", "--device", "cpu"]
    assert main(argv) == 0
    assert main([*argv, "--verify"]) == 2
    assert "its SHA-256 is another one" in capsys.readouterr().err


@pytest.mark.parametrize("convert", [convert_to_pth, convert_to_safetensors, convert_to_published])
def test_damaged_weights_are_not_written_again(folder, tmp_path, convert):
    flip(folder / WEIGHTS)
    with pytest.raises(ValueError, match="its SHA-256 is another one"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("convert", [convert_to_safetensors, convert_to_published])
def test_what_a_converter_writes_has_checksums_of_its_own(folder, tmp_path, convert, capsys):
    convert(folder, tmp_path / "out", shard_bytes=100_000)
    code, said = verify(capsys, tmp_path / "out")
    files = [path.name for path in (tmp_path / "out").iterdir()]
    assert (code, said) == (0, [f"{tmp_path}/out/checksums.json: all {len(files) - 1} files are as described"])


def test_verify_names_every_file_that_differs_in_a_run(folder, stage, tmp_path, capsys):
    assert verify(capsys, tmp_path)[0] == 0
    flip(stage / "metrics.csv")
    flip(folder / WEIGHTS)
    (folder / "modeling.py").unlink()
    code, said = verify(capsys, tmp_path)
    assert code == 1
    assert said == [
        f"{stage}/metrics.csv is not the file its manifest.json describes (its SHA-256 is another one)",
        f"{folder}/{WEIGHTS} is not the file its checksums.json describes (its SHA-256 is another one)",
        f"{folder}/modeling.py is not the file its checksums.json describes (it is missing)",
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"sha256": 1}', '{"sha256": {"../x": "0"}}', '{"bytes": {}}'])
def test_damaged_checksums_are_a_difference(folder, content, capsys):
    (folder / "checksums.json").write_text(content)
    code, said = verify(capsys, folder)
    assert code == 1 and len(said) == 1 and "checksums.json is damaged" in said[0]
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize(("name", "what"), [("nowhere", "does not exist"), ("plain", "has no hashes to compare with")])
def test_what_has_no_hashes_is_a_users_error(tmp_path, capsys, name, what):
    (tmp_path / "plain").mkdir()
    code, said = verify(capsys, tmp_path / name)
    assert code == 2 and len(said) == 1 and what in said[0]


def test_an_export_makes_way_for_a_newer_one(folder):
    remove_export(folder)
    remove_export(folder)
    assert not folder.exists() and not list(folder.parent.iterdir())


def test_an_export_makes_way_also_after_a_kill(folder, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("radlads.checkpoint.atomic.remove_marked", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_export(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["hf.partial"]
    assert (folder.parent / "hf.partial" / MARK).is_file()


def add_notes(folder):
    (folder / "notes.txt").write_text("mine")


def edit_template(folder):
    (folder / "tokenizer_config.json").write_text("{}")


def forget(folder):
    (folder / "checksums.json").unlink()


def link(folder):
    folder.rename(folder.with_name("mine"))
    folder.symlink_to("mine")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (add_notes, "notes.txt is in the way, and no run wrote it"),
        (edit_template, "tokenizer_config.json is not the file"),
        (forget, "has no checksums.json"),
        (link, "is a symbolic link"),
    ],
)
def test_a_folder_that_is_not_the_export_as_written_is_left_alone(folder, change, why):
    change(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=why):
        remove_export(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.fixture
def own_teacher(teacher, tmp_path):
    """A teacher of the test's own, and the folder of a conversion that has recorded it."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    out = tmp_path / "out"
    claim_folder(out, {"teacher": "before"}, {}, tiny.Silent())
    record_teacher(out, teacher_checksums(folder))
    return folder, out


def test_a_teacher_that_changes_meanwhile_is_named(own_teacher, capsys):
    folder, out = own_teacher
    check_teacher(out)
    flip(folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"teacher/model\.safetensors is not .*: put the teacher back as it was"):
        check_teacher(out)
    with pytest.raises(ValueError, match=r"\(different: teacher\): .*teacher/model\.safetensors is not the file"):
        claim_folder(out, {"teacher": "after"}, {}, tiny.Silent())
    assert verify(capsys, out)[0] == 1


def test_a_teacher_that_is_gone_is_no_difference(own_teacher, capsys):
    folder, out = own_teacher
    shutil.rmtree(folder)
    code, said = verify(capsys, out)
    assert code == 0 and f"{folder} is not there" in said[0]


def test_the_first_record_of_a_teacher_stays(own_teacher):
    folder, out = own_teacher
    before = (out / "teacher.checksums.json").read_bytes()
    flip(folder / WEIGHTS)
    record_teacher(out, teacher_checksums(folder))
    assert (out / "teacher.checksums.json").read_bytes() == before


def test_a_full_disk_is_told_by_the_records_own_name(tmp_path):
    record = tmp_path / "train.checksums.json"
    with largest_file(1000), pytest.raises(OSError, match="checksums") as raised:
        write_checksums(record, {"sha256": {"train.bin": "0" * 2000}})
    assert raised.value.filename == str(record) and not list(tmp_path.iterdir())
