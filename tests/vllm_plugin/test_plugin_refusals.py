"""What the plugin would get wrong is refused in a sentence, before any weight is read."""

import json

import engines
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

OPTIONS = {
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "no speculative decoding",
    ),
    "LoRA": ({"enable_lora": True}, "no LoRA adapters"),
    "layers": ({"pipeline_parallel_size": 2}, "cannot be split by layers"),
    "pooling": ({"runner": "pooling"}, "generate text"),
    "heads": ({"tensor_parallel_size": 3}, "3 does not divide the model's 4 num_attention_heads"),
    "key heads": ({"tensor_parallel_size": 4}, "4 does not divide the model's 2 num_key_value_heads"),
    "unknown quantisation": ({"quantization": "int9"}, "int9"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return engines.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("options", "sentence"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, sentence, folder):
    with pytest.raises(ValueError, match=sentence), engines.engine(folder, **options):
        pass


def test_a_mixer_of_ones_own(folder, tmp_path):
    copied = tmp_path / "hf"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    config["time_mixers"] = ["rad_rwkv7", "my_mixer", "rad_rwkv7"]
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no mixer named 'my_mixer'"), engines.engine(copied):
        pass


def test_another_version_of_vllm_is_refused_once_a_model_of_ours_is_read(folder, monkeypatch):
    from radlads.vllm_plugin import register

    monkeypatch.setattr(register, "TESTED", ((0, 1), (0, 2)))
    register.register()
    try:
        with pytest.raises(ValueError, match=r"vLLM 0\.1 to 0\.2, and this is"), engines.engine(folder):
            pass
    finally:
        monkeypatch.undo()
        register.register()
