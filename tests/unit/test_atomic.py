"""Folders and files that appear whole or not at all."""

import errno
import fcntl

import pytest
from root_scripts import largest_file

from radlads.checkpoint import own_files
from radlads.checkpoint.atomic import unfinished_file, unfinished_folder
from radlads.files import write_text
from radlads.recipes.conversion_folder import only_process_in


def test_a_folder_has_its_name_when_it_is_complete(tmp_path):
    with unfinished_folder(tmp_path / "x") as partial:
        (partial / "a").write_text("1")
        assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "a").read_text() == "1"


@pytest.mark.parametrize(("keep_failed", "left"), [(True, ["x.partial"]), (False, [])])
def test_what_a_failure_leaves(tmp_path, keep_failed, left):
    with pytest.raises(KeyboardInterrupt), unfinished_folder(tmp_path / "x", keep_failed=keep_failed):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == left


def test_an_older_unfinished_folder_makes_way(tmp_path):
    with pytest.raises(KeyboardInterrupt), unfinished_folder(tmp_path / "x") as partial:
        (partial / "old").mkdir()
        (partial / "old" / "file").touch()
        raise KeyboardInterrupt
    with unfinished_folder(tmp_path / "x"):
        pass
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("keep_failed", [True, False])
def test_a_folder_that_only_bears_the_name_is_left_alone(tmp_path, keep_failed):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "thesis").write_text("mine")
    with pytest.raises(ValueError, match=r"x\.partial is in the way, and nothing in it says that radlads wrote it"):
        unfinished_folder(tmp_path / "x", keep_failed=keep_failed).__enter__()
    assert (tmp_path / "x.partial" / "thesis").read_text() == "mine"


@pytest.mark.parametrize("keep_earlier", [True, False])
def test_a_link_by_the_name_is_left_alone_with_what_it_leads_to(tmp_path, keep_earlier):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    (tmp_path / "x.partial").symlink_to("mine")
    with pytest.raises(ValueError, match=r"x\.partial is a symbolic link"):
        unfinished_folder(tmp_path / "x", keep_earlier=keep_earlier).__enter__()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis"]


def test_a_file_that_bears_an_unfinished_ones_old_name_is_left_alone(tmp_path):
    (tmp_path / "x.partial").write_text("mine")
    with unfinished_file(tmp_path / "x") as unfinished:
        unfinished.write_text("1")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "1", "x.partial": "mine"}


def test_a_file_is_written_by_one_process_and_through_no_link(tmp_path):
    with unfinished_file(tmp_path / "x") as unfinished:
        unfinished.write_text("1")
        with pytest.raises(ValueError, match="is being written by another process"):
            unfinished_file(tmp_path / "x").__enter__()
        name = unfinished.name.replace("x", "y", 1)
    (tmp_path / name).symlink_to("x")
    with pytest.raises(ValueError, match="is a symbolic link"):
        unfinished_file(tmp_path / "y").__enter__()
    assert (tmp_path / "x").read_text() == "1"


def test_a_folder_killed_while_it_is_emptied_can_be_emptied_again(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    own_files.mark(folder)
    (folder / "a").mkdir()
    (folder / "b").touch()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("radlads.checkpoint.own_files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            own_files.remove_marked(folder)
    own_files.remove_marked(folder)
    assert not folder.exists()


NAMES = ("run.json", "step-*/shard-*.safetensors", "wandb/**")


@pytest.mark.parametrize(
    "known", ["run.json", ".run.json.1ab_9xyz", "step-1/shard-0.safetensors", "wandb/a/b", ".radlads-unfinished"]
)
def test_a_name_that_a_run_gives_is_removed(tmp_path, known):
    path = tmp_path / "x" / known
    path.parent.mkdir(parents=True)
    path.touch()
    own_files.remove_folder(tmp_path / "x", NAMES)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "mine", ["notes.txt", "my_run.json", "step-1/run.json", "wandb", "step-1/a/shard-0.safetensors"]
)
def test_another_name_keeps_the_whole_folder(tmp_path, mine):
    (tmp_path / "x" / mine).parent.mkdir(parents=True)
    for name in (mine, "run.json"):
        (tmp_path / "x" / name).touch()
    with pytest.raises(ValueError, match=f"{mine} is in the way, and no run wrote it: move it"):
        own_files.remove_folder(tmp_path / "x", NAMES)
    assert (tmp_path / "x" / mine).exists() and (tmp_path / "x" / "run.json").exists()


def test_a_linked_folder_within_is_no_runs(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "x" / "wandb").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="wandb is in the way"):
        own_files.remove_folder(tmp_path / "x", NAMES)


def test_a_folder_that_is_being_filled_is_left_alone(tmp_path):
    with unfinished_folder(tmp_path / "x") as partial:
        (partial / "a").touch()
        with pytest.raises(ValueError, match=r"x\.partial is being written by another process: wait"):
            unfinished_folder(tmp_path / "x").__enter__()
    assert (tmp_path / "x" / "a").exists()


@pytest.mark.parametrize("unfinished", [unfinished_folder, unfinished_file])
@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere")])
def test_a_name_that_is_taken_is_refused(tmp_path, unfinished, make):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match="x exists already"):
        unfinished(tmp_path / "x").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("unfinished", [unfinished_folder, unfinished_file])
def test_errors_of_writing_name_the_target(tmp_path, unfinished):
    with pytest.raises(OSError, match="x") as raised, unfinished(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "x")


def test_where_there_are_no_locks_work_goes_on(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with unfinished_file(tmp_path / "x") as unfinished, only_process_in(tmp_path):
        unfinished.write_text("1")
    assert (tmp_path / "x").read_text() == "1"


def test_a_second_conversion_into_a_folder_is_refused(tmp_path):
    refused = pytest.raises(ValueError, match=f"another process is converting into {tmp_path}: wait for it")
    with only_process_in(tmp_path), refused, only_process_in(tmp_path):
        pass


def test_a_full_disk_is_told_by_the_texts_own_name_and_leaves_the_old_one(tmp_path):
    (tmp_path / "x").write_text("old")
    with largest_file(1000), pytest.raises(OSError, match="x") as raised:
        write_text(tmp_path / "x", "new" * 1000)
    assert raised.value.filename == str(tmp_path / "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
