"""Teachers' folders as people have them: heads that config.json is wrong about, shards, adapters, quantised weights,
half a download. Each works as in transformers, or is one sentence before any weight is read or fetched."""

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tolerances import PARITY
from transformers import AutoModelForCausalLM

from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.weights import EMBEDDING, HEAD, SafetensorsFolder
from radlads.cli import main
from radlads.convert import hf_source
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_teacher
from radlads.evaluation.models import notes_on
from radlads.evaluation.models import open_model as open_any_model
from radlads.recipes import single_stage
from radlads.recipes.conversion import run_conversion
from radlads.recipes.stage_configs import Conversion

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX, SINGLE, UP = "model.safetensors.index.json", "model.safetensors", "model.layers.1.mlp.up_proj.weight"


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def shard(folder):
    """Spread a folder's weights over two shards, beside the single file."""
    weights = load_file(folder / SINGLE)
    names = sorted(weights)
    for number, file in enumerate(SHARDS):
        save_file({name: weights[name] for name in names[number::2]}, folder / file, metadata={"format": "pt"})
    index = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def shards_alone(folder):
    shard(folder)
    (folder / SINGLE).unlink()


def store_other_head(weights):
    weights[HEAD] = weights[EMBEDDING] + 0.3 * torch.randn_like(weights[EMBEDDING])


@pytest.fixture
def folder(teacher, tmp_path):
    return shutil.copytree(teacher, tmp_path / "copy")


@pytest.fixture
def tied(tmp_path):
    """A teacher whose config.json calls its head its embedding, though the weights hold another head."""
    folder = tiny.teacher_folder(tmp_path / "tied", tied=True)
    change_weights(folder, store_other_head)
    return folder


def assert_equal_to_transformers(folder):
    ids = torch.randint(0, 256, (2, 37), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (build_teacher(open_teacher(folder))(ids).logits - theirs(ids).logits).abs().max() < PARITY


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen2-yarn"])
def test_a_stored_head_that_differs_is_used_whatever_config_says(tmp_path, family):
    folder = tiny.family_folder(tmp_path / family, family, tied=True)
    change_weights(folder, store_other_head)
    assert_equal_to_transformers(folder)
    source = open_teacher(folder)
    assert not source.config.tie_word_embeddings
    assert source.notes == (
        f"{folder} says that its head is its embedding, but stores another lm_head.weight, which is used",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equal_copy_of_the_embedding_stays_tied(tmp_path, dtype):
    folder = tiny.teacher_folder(tmp_path / "tied", tied=True)
    change_weights(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].to(dtype).clone()}))
    assert_equal_to_transformers(folder)
    source = open_teacher(folder)
    assert source.config.tie_word_embeddings and source.notes == ()
    teacher = build_teacher(source)
    assert teacher.lm_head.weight is teacher.model.embed_tokens.weight


@pytest.mark.parametrize("stage", ["align", "distill", "extend"])
@pytest.mark.parametrize("bare", [False, True], ids=["folder", "weights file"])
def test_every_stage_has_the_stored_head_and_says_so(tied, tmp_path, monkeypatch, stage, bare):
    keys = {"train.teacher.hf_path": str(tied)}
    if bare:
        keys["train.teacher.path"] = str(tied / SINGLE)
    if stage != "align":
        (tmp_path / "student").mkdir()
        save_model(tiny.moved_student(tied, tmp_path), tmp_path / "student")
        keys["train.load_model"] = str(tmp_path / "student")
    tiny.corpus(tmp_path / "train")
    console, models = tiny.Silent(), []
    monkeypatch.setattr(single_stage, "run_stage", lambda config, *two, **rest: models.extend(two[:2]))
    single_stage.train_stage(tiny.stage_config(tmp_path, stage, **keys), console)
    head = load_file(tied / SINGLE)[HEAD]
    assert torch.equal(models[1].lm_head.weight, head)
    assert stage != "align" or torch.equal(models[0].lm_head.weight, head)
    assert sum("stores another lm_head.weight" in line for line in console.lines) == 1


def test_the_demo_refuses_to_retie_a_head_that_differs(tied, tmp_path):
    console = tiny.Silent()
    with pytest.raises(ValueError, match="has a head of its own, not its embedding: convert it without --retie"):
        run_conversion(Conversion(teacher=tied, out=tmp_path / "out", retie=True), console)
    assert not (tmp_path / "out").exists() and "stores another lm_head.weight" in console.lines[0]


def test_evaluation_has_the_stored_head_too(tied):
    assert torch.equal(open_any_model(tied, torch.float32).lm_head.weight, load_file(tied / SINGLE)[HEAD])
    assert len(notes_on(tied)) == 1


def test_a_student_with_a_stored_head_that_differs_keeps_it(teacher, tmp_path):
    student = tiny.moved_student(teacher, tmp_path)
    (tmp_path / "model").mkdir()
    save_model(student, tmp_path / "model")
    change_config(tmp_path / "model", tie_word_embeddings=True)
    assert torch.equal(load_model(tmp_path / "model").lm_head.weight, student.lm_head.weight)
    change_weights(tmp_path / "model", lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    tied = load_model(tmp_path / "model")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_a_quantised_teacher_is_one_sentence_before_its_weights_are_read(folder, method):
    (folder / SINGLE).unlink()
    change_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=rf"copy is quantised \({method}\), which is not supported: take the check"):
        open_teacher(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_numbers_that_need_scales_are_refused_by_name(folder, dtype, monkeypatch):
    change_weights(folder, lambda weights: weights.update({UP: weights[UP].to(dtype)}))
    monkeypatch.setattr(SafetensorsFolder, "__getitem__", None)  # nothing is read
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{UP} in .*copy holds {kind}, as quantised weights do: take the check"):
        open_teacher(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_half_precision_is_read_under_either_key(folder, dtype, key):
    change_weights(folder, lambda weights: weights.update({name: weights[name].to(dtype) for name in weights}))
    change_config(folder, **{"dtype": None, key: str(dtype).removeprefix("torch.")})
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "qwen2-yarn"])
@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_that_names_no_architecture_goes_by_its_model_type(tmp_path, family, architectures):
    folder = tiny.family_folder(tmp_path / "teacher", family)
    change_config(folder, architectures=architectures)
    assert_equal_to_transformers(folder)
    assert open_any_model(folder, torch.float32).config.time_mixers == ["qwen2"] * 3


def single_beside_other_shards(folder):
    shard(folder)
    change_weights(folder, lambda weights: weights.update({UP: 1.5 * weights[UP]}))


def stale_index(folder):
    shard(folder)
    for file in SHARDS:
        (folder / file).unlink()


def originals_beside(folder):
    (folder / "original").mkdir()
    shards_alone(folder)
    for name in ("consolidated.safetensors", "original/consolidated.00.safetensors"):
        save_file({"tok_embeddings.weight": torch.ones(2)}, folder / name)


def index_without_head(folder):
    shards_alone(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][HEAD]
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("change", [single_beside_other_shards, stale_index, originals_beside, index_without_head])
def test_of_several_weights_files_those_of_transformers_are_read(folder, change):
    change(folder)
    assert_equal_to_transformers(folder)


def unfinished_shard(folder):
    shards_alone(folder)
    (folder / SHARDS[1]).unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/a.incomplete").touch()


def with_shard(content):
    def change(folder):
        shards_alone(folder)
        (folder / SHARDS[1]).write_bytes(content)

    return change


def renamed(name):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / SINGLE).rename(folder / name)

    return change


def no_index(folder):
    shards_alone(folder)
    (folder / INDEX).unlink()


def index_that_leaves(folder):
    (folder / SINGLE).rename(folder.parent / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": {UP: f"../{SINGLE}"}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unfinished_shard, r"model-00002-of-00002\.safetensors is missing: its download has not finished \(a\.incompl"),
        (renamed(f"{SINGLE}.incomplete"), r"holds no weights: its download has not finished \(model\.safet.*start it"),
        (with_shard(POINTER), r"00002\.safetensors is a git-lfs pointer, not the file itself: run git lfs pull in "),
        (with_shard(b""), r"00002\.safetensors is truncated or not a safetensors file"),
        (renamed("pytorch_model.bin"), r"holds no weights: pytorch_model\.bin is a pickle, which could run code: save"),
        (renamed("consolidated.safetensors"), r"no weights: consolidated\.safetensors is not what transformers reads"),
        (renamed("original/consolidated.00.pth"), "no weights: original/ is not what transformers reads"),
        (renamed("model.fp16.safetensors"), r"no weights: model\.fp16\.safetensors is not what transformers reads"),
        (no_index, r"no weights: model\.safetensors\.index\.json is missing, which names its 2 shards: copy it too"),
        (index_that_leaves, r"index\.json is not an index of safetensors shards"),
    ],
)
def test_a_folder_without_weights_says_why(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        open_teacher(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("left", [["config.json", SINGLE], []], ids=["beside its base", "alone"])
def test_an_adapter_is_refused_with_the_remedy(folder, left):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in {"config.json", SINGLE} - set(left):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"copy holds an adapter \(adapter_config\.json\): merge it into its base"):
        open_teacher(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has a tokenizer.model but no tokenizer.json: make it, with transformers'"),
        (POINTER, "tokenizer.json is a git-lfs pointer, not the file itself: run git lfs pull in"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told_before_the_weights(folder, tmp_path, capsys, content, message):
    (folder / SINGLE).unlink()
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    assert main(["demo", "--teacher", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub whose owner/name is the folder in two shards, beside other weights; the names of what was fetched of it."""
    shards_alone(folder)
    (folder / "consolidated.safetensors").touch()
    cache, fetched = tmp_path / "cache", []

    def fetch(name, patterns, what):
        cache.mkdir(exist_ok=True)
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            shutil.copyfile(path, cache / path.name)
            fetched.append(path.name)
        return cache

    monkeypatch.setattr(hf_source, "locate_folder", fetch)
    return fetched


def test_of_a_hub_model_the_files_that_are_read_are_fetched(hub):
    assert open_teacher("owner/name").weights[UP].shape == (96, 64)
    assert [name for name in hub if name.endswith(".safetensors")] == SHARDS


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"architectures": ["GPT2LMHeadModel"]},
        {"hidden_act": "gelu"},
        {"head_dim": -16},
    ],
    ids=str,
)
def test_no_weights_are_fetched_of_a_hub_model_that_cannot_be_read(folder, hub, values):
    change_config(folder, **values)
    with pytest.raises(ValueError):
        open_teacher("owner/name")
    assert hub and not [name for name in hub if name.endswith(".safetensors")]
