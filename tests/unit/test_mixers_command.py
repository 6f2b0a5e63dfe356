"""`radlads mixers`: what is found without running it, and what a mixer says about itself."""

import sys

import pytest

from radlads.cli import main
from radlads.model import registry

WINDOW = '''
open(__file__ + ".was_run", "w").close()
from dataclasses import dataclass
from typing import Literal

from radlads.model.rad_rwkv6 import RadRwkv6


@dataclass(frozen=True)
class Base:
    window: int = 64
    """Tokens that the softmax part sees,
    the newest included."""
    kind: Literal["soft", "hard"] = "soft"


@dataclass(frozen=True)
class Settings(Base):
    rate: float = 0.5
    """How much of it counts."""


class TMix_windowed(RadRwkv6):
    title = "a window beside RAD-RWKV6"
    Settings = Settings
    made_for = frozenset({"CUDA graph"})
    obstacles = {"llama.cpp": "it has no windows"}
'''


@pytest.fixture
def windowed(tmp_path, monkeypatch):
    (tmp_path / "tmix").mkdir()
    (tmp_path / "tmix" / "tmix_windowed.py").write_text(WINDOW)
    for name in ("_named_by_user", "_mixer_paths"):
        monkeypatch.setattr(registry, name, set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for module in [name for name in sys.modules if name.partition(".")[0] == "tmix"]:
        del sys.modules[module]


def test_mixers_are_listed_without_running_their_files(windowed, capsys):
    assert main(["mixers", "--mixer-path", str(windowed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "rad_rwkv7  RAD-RWKV7, also called qwerky7" in lines
    assert f"windowed   {windowed / 'tmix' / 'tmix_windowed.py'}" in lines
    assert not list(windowed.rglob("*.was_run")) and "tmix.tmix_windowed" not in sys.modules


def test_without_files_the_registered_mixers_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mixers"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["qwen2", "rad_rwkv6", "rad_rwkv7"]


def test_a_mixer_of_ones_own_says_its_settings(windowed, capsys):
    assert main(["mixers", "windowed", "--mixer-path", str(windowed)]) == 0
    assert (
        capsys.readouterr().out
        == """\
windowed: a window beside RAD-RWKV6
state: has one size, however long the text is
from the teacher: q_proj, k_proj, v_proj, o_proj, q_norm, k_norm; all else is fresh
decay and shift (train.trainable decay): time_decay*, time_maa_*
variant balanced (default): balance_state 1, groupnorm_att 0
--model.mixer.window: a whole number, default 64
    Tokens that the softmax part sees, the newest included.
--model.mixer.kind: one of 'soft', 'hard', default 'soft'
--model.mixer.rate: a number, default 0.5
    How much of it counts.
made for: CUDA graph
not for llama.cpp: it has no windows
not for vLLM: a window beside RAD-RWKV6 is not made for it
not for published format: a window beside RAD-RWKV6 is not made for it
not for fused decode: a window beside RAD-RWKV6 is not made for it
not for packed rows: a window beside RAD-RWKV6 is not made for it
"""
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("qwerky7", "variant group_norm: balance_state 0, groupnorm_att 1"),
        ("rad_rwkv7", "first values: the first layer of this mixer makes them, later ones mix them in"),
        ("rad_rwkv6", "not for fused decode: there are no fused kernels for RAD-RWKV6"),
        ("qwen3", "state: grows with the text"),
        ("qwen2", "settings: none"),
        ("rad_rwkv6", "--model.mixer.sink_tokens: a whole number, default 0"),
    ],
)
def test_a_registered_mixer(capsys, name, line):
    assert main(["mixers", name]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_an_unknown_mixer_is_one_sentence(capsys):
    assert main(["mixers", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("radlads: no mixer named 'nosuch': use one of qwen2, rad_rwkv6, ")
