"""Folders and files that appear whole or not at all."""

import pytest
from root_scripts import largest_file

from radlads.checkpoint.atomic import unfinished_file, unfinished_folder, write_text


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
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "old").touch()
    with unfinished_folder(tmp_path / "x"):
        pass
    assert list((tmp_path / "x").iterdir()) == []


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


def test_a_full_disk_is_told_by_the_texts_own_name_and_leaves_the_old_one(tmp_path):
    (tmp_path / "x").write_text("old")
    with largest_file(1000), pytest.raises(OSError, match="x") as raised:
        write_text(tmp_path / "x", "new" * 1000)
    assert raised.value.filename == str(tmp_path / "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
