"""Fixtures shared by all tests: one tiny teacher and corpus per session, and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import tiny


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return tiny.teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    tiny.corpus(folder / "train")
    tiny.corpus(folder / "heldout", seed=1)
    return folder
