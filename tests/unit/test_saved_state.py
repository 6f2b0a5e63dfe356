"""A text read once: its state goes to a file and back, bit for bit, and into no other model."""

import dataclasses
import math

import documented_mixers
import pytest
import tiny
import torch
from root_scripts import largest_file
from safetensors.torch import load_file, save_file

from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.inference import decoder, saved_state
from radlads.inference.finite import NotFinite
from radlads.inference.generate import Sampling, generate_tokens, stream_tokens
from radlads.inference.prefill import prefill
from radlads.inference.saved_state import fingerprint, load_state, read_text, save_state

DOCUMENT = [number * 7 % 251 for number in range(150)]
QUESTION = list(b"what was that?")
DRAWN = Sampling(seed=3, max_tokens=12)
MINE = "0" * 64


@pytest.fixture(autouse=True)
def pieces_of_64_tokens(monkeypatch):
    monkeypatch.setattr(saved_state, "PREFILL_TOKENS", 64)
    for reader in (decoder.Decoder.prefill, decoder.prefill):
        monkeypatch.setitem(reader.__wrapped__.__kwdefaults__, "piece", 64)


def student(teacher, folder, mixer):
    torch.manual_seed(0)
    mixer, _, window = mixer.partition("-window-")
    windows = {"model.mixer.window_tokens": int(window), "model.mixer.sink_tokens": 3} if window else {}
    config = tiny.stage_config(folder, "align", **{"model.tmix": mixer}, **windows)
    model, _ = build_student(open_teacher(teacher), config.model)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=["rad_rwkv6", "rad_rwkv7-window-9", "rad_rwkv7", "qwen2", "leaky", "mean"])
def model(request, teacher, tmp_path_factory):
    folder = documented_mixers.write_mixers(tmp_path_factory.mktemp("mixers"))
    with documented_mixers.known(folder):
        yield student(teacher, tmp_path_factory.mktemp("none"), request.param)


@pytest.fixture(scope="module")
def recurrent(teacher, tmp_path_factory):
    return student(teacher, tmp_path_factory.mktemp("none"), "rad_rwkv6")


def saved_and_loaded(model, tokens, path):
    save_state(read_text(model, tokens), MINE, path)
    return load_state(model, MINE, path)


@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_going_on_from_a_file_is_going_on_without_it_bit_for_bit(model, tmp_path, length):
    document = DOCUMENT[:length]
    after = saved_and_loaded(model, document, tmp_path / "state")
    assert after.num_tokens == length and 1 <= len(after.tail) <= 64
    logits, _ = prefill(model, torch.tensor([after.tail + QUESTION]), piece=64, cache=after.rows(1))
    assert torch.equal(logits, prefill(model, torch.tensor([document + QUESTION]), piece=64)[0])
    for question in ([], QUESTION):
        uninterrupted = list(stream_tokens(model, document + question, DRAWN))
        assert list(stream_tokens(model, question, DRAWN, after=after)) == uninterrupted


def test_a_text_is_read_in_parts_as_it_is_read_whole(model):
    parts = read_text(model, DOCUMENT[100:], read_text(model, DOCUMENT[:100]))
    whole = read_text(model, DOCUMENT)
    assert parts.tail == whole.tail
    expected = [prefill(model, torch.tensor([read.tail]), cache=read.rows(1))[0] for read in (whole, parts)]
    assert torch.equal(*expected)


def test_many_questions_about_one_text(model, tmp_path):
    after = saved_and_loaded(model, DOCUMENT, tmp_path / "state")
    questions = [QUESTION, QUESTION[:3], []]
    alone = [
        list(stream_tokens(model, question, dataclasses.replace(DRAWN, seed=3 + row), after=after))
        for row, question in enumerate(questions)
    ]
    assert generate_tokens(model, questions, DRAWN, after=after) == alone


def test_an_empty_text_has_no_state(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        read_text(model, [])


@pytest.fixture
def state_file(recurrent, tmp_path):
    save_state(read_text(recurrent, DOCUMENT), MINE, tmp_path / "state")
    return tmp_path / "state"


def refused(model, path, message, model_fingerprint=MINE):
    with pytest.raises(ValueError, match=message):
        load_state(model, model_fingerprint, path)


def test_another_models_state_is_refused(recurrent, state_file):
    refused(recurrent, state_file, "the state of another model", "1" * 64)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_state_is_refused(recurrent, state_file, share):
    content = state_file.read_bytes()
    state_file.write_bytes(content[: int(share * len(content))])
    refused(recurrent, state_file, "truncated or no state file")


def test_a_changed_byte_is_refused(recurrent, state_file):
    content = bytearray(state_file.read_bytes())
    content[-9] ^= 1
    state_file.write_bytes(content)
    refused(recurrent, state_file, "is damaged")


def test_what_is_no_state_file_is_refused(recurrent, tmp_path):
    refused(recurrent, tmp_path / "nothing", "no such file")
    (tmp_path / "text").write_text("Once upon a time")
    refused(recurrent, tmp_path / "text", "truncated or no state file")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights", metadata={"format": "pt"})
    refused(recurrent, tmp_path / "weights", "no state file of this version")


def test_a_state_is_never_written_over_another(recurrent, state_file):
    content = state_file.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        save_state(read_text(recurrent, QUESTION), MINE, state_file)
    assert state_file.read_bytes() == content
    assert sorted(path.name for path in state_file.parent.iterdir()) == ["state"]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(recurrent, tmp_path):
    read = read_text(recurrent, DOCUMENT)
    with largest_file(5000), pytest.raises(OSError, match="state"):
        save_state(read, MINE, tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_not_finite_is_not_stored(recurrent, tmp_path):
    read = read_text(recurrent, DOCUMENT)
    with torch.inference_mode():
        read.cache.layers[1].state.wkv[0, 0, 0, 0] = math.inf
    with pytest.raises(NotFinite, match="states are not finite within the first 128 tokens"):
        save_state(read, MINE, tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_knows_weights_of_the_same_sizes_apart(teacher, tmp_path):
    config = open_teacher(teacher).config
    folder = tmp_path / "other"
    folder.mkdir()
    weights = load_file(teacher / "model.safetensors")
    save_file(weights, folder / "model.safetensors")
    assert fingerprint(folder, config) == fingerprint(teacher, config)
    name = sorted(weights)[5]
    save_file(weights | {name: weights[name] * 1.001}, folder / "model.safetensors")
    assert fingerprint(folder, config) != fingerprint(teacher, config)


# A user's own mixer, whose state has tensors of its own


def test_a_file_holds_all_that_an_own_mixers_state_has(teacher, tmp_path):
    documented_mixers.write_mixers(tmp_path / "mixers")
    with documented_mixers.known(tmp_path / "mixers"):
        model = student(teacher, tmp_path, "leaky")
        after = saved_and_loaded(model, DOCUMENT, tmp_path / "state")
    stored, expected = load_file(tmp_path / "state"), read_text(model, DOCUMENT).cache
    for index, layer in enumerate(expected.layers):
        assert torch.equal(stored[f"layers.{index}.mean"], layer.state.mean)
        assert torch.equal(after.cache.layers[index].state.mean, layer.state.mean) and layer.state.mean.any()


@pytest.mark.parametrize("mixer", ["leaky", "mean"])
def test_beams_carry_an_own_mixers_state(teacher, tmp_path, mixer):
    documented_mixers.write_mixers(tmp_path / "mixers")
    with documented_mixers.known(tmp_path / "mixers"):
        model = student(teacher, tmp_path, mixer)
    prompt = torch.tensor([DOCUMENT[:9], DOCUMENT[5:14]])
    kept = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    cached, plain = (model.generate(prompt, use_cache=use, **kept) for use in (True, False))
    assert torch.equal(cached, plain)


def test_settings_of_a_mixer_tell_models_apart_and_none_change_no_fingerprint(teacher):
    config = open_teacher(teacher).config
    found = []
    for settings in ({}, {"leaky": {"leak": 0.25}}, {"leaky": {"leak": 0.5}}):
        config.mixer_settings = settings
        found.append(fingerprint(teacher, config))
    del config.__dict__["mixer_settings"]  # as before there were any
    assert len(set(found)) == 3 and fingerprint(teacher, config) == found[0]
