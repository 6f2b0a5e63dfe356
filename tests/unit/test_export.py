"""`radlads export`: which model a run stands for, what is written and refused, the card, llama.cpp and the hub."""

import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from huggingface_hub import HfApi, constants, metadata_load
from huggingface_hub.utils import filter_repo_objects

from radlads.checkpoint.manifest import weights_hash, write_manifest
from radlads.checkpoint.model_folder import load_model, save_model
from radlads.checkpoint.weights import ModelWeights, SafetensorsFolder
from radlads.cli import main
from radlads.config.load import dump_config
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student
from radlads.model.configuration import RadladsConfig
from radlads.recipes import export as export_module
from radlads.recipes import hub_upload
from radlads.recipes.llama_cpp import check_runs, fastest_decay
from radlads.recipes.model_card import Licence, read_licence
from radlads.recipes.reload_check import logits_of

RWKV6 = {
    "model.tmix": "rad_rwkv6",
    "model.gate_rank_type": 1,
    "model.use_pos_emb": 0,
    "model.use_tokenshift": 1,
    "model.balance_state": 1,
}
HELDOUT = {"loss": 3.25, "kl": 0.125, "top1": 0.75, "num_tokens": 640}


@pytest.fixture(autouse=True, scope="module")
def _load_in_this_process():
    """The real thing, a process of its own, takes seconds: tests/e2e/test_export_command.py."""

    def reloaded(folder, token_ids, dtype):
        return logits_of(load_model(folder, dtype=dtype), token_ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "reloaded_logits", reloaded)
        yield


def stage(teacher, folder, *, name="align", parent="setup of teacher", seed=0, heldout=HELDOUT, **keys):
    """A finished stage's folder, as training leaves it."""
    config = tiny.stage_config(folder.parent, "align", **{"train.teacher.hf_path": str(teacher)} | keys)
    torch.manual_seed(seed)
    student, _ = build_student(open_teacher(teacher), config.model)
    folder.mkdir(parents=True)
    save_model(student, folder)
    (folder / "config.yaml").write_text(dump_config(config))
    write_manifest(folder, stage=name, parent=parent, recipe="0", tokens=1280, seconds=1.5, heldout=heldout)
    return folder


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    return stage(teacher, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def run6(teacher, tmp_path):
    return stage(teacher, tmp_path / "run6", **RWKV6)


def export(*words):
    return main(["export", *map(str, words)])


def refused(capsys, *words):
    capsys.readouterr()
    assert export(*words) == 2
    return capsys.readouterr().err


def test_an_export_is_the_runs_model_with_the_teachers_tokenizer(run, teacher, tmp_path, capsys):
    assert export(run, tmp_path / "out") == 0
    assert "differ from the model's by at most 0.0e+00" in capsys.readouterr().out
    assert torch.equal(*(logits_of(load_model(folder), [1, 2, 3]) for folder in (run, tmp_path / "out")))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (teacher / file).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert not list(tmp_path.glob("*.partial"))


def test_shards_and_number_type_are_the_ones_asked_for(run, tmp_path):
    assert export(run, tmp_path / "out", "--shard-size", "50KB", "--dtype", "bfloat16") == 0
    shards = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 60_000 for shard in shards)
    weights = SafetensorsFolder(tmp_path / "out")
    assert {weights.info(name).dtype for name in weights} == {torch.bfloat16}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | bfloat16, cast from float32 after the measurements |" in card


def test_what_a_teacher_has_comes_along_and_what_it_lacks_is_made(tmp_path):
    teacher = tiny.teacher_folder(tmp_path / "teacher", vocab_size=257)  # no padding, which needs the file anyway
    (teacher / "generation_config.json").unlink()
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    (teacher / "LICENSE").write_text("as you like")
    assert export(stage(teacher, tmp_path / "run"), tmp_path / "out") == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 256
    (teacher / "generation_config.json").write_text('{"temperature": 0.5}')
    assert export(tmp_path / "run", tmp_path / "again") == 0
    assert (tmp_path / "again" / "generation_config.json").read_text() == '{"temperature": 0.5}'


def test_the_card_has_the_runs_figures_and_says_what_is_not_measured(run, tmp_path):
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| align | 3.2500 | 0.1250 | 75.0% | 1,280 | 2 |" in card
    assert "docs/which_student.md" in card.split("## What it is")[1].split("## ")[0]
    assert "3 x RAD-RWKV7" in card and "| weights | float32 |" in card
    assert card.count("\nnot measured\n") == 3  # tasks, long context, speed
    assert "unknown: ask" in card
    assert str(tmp_path) not in card
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert metadata["license"] == "unknown" and metadata["library_name"] == "transformers"


def test_the_card_names_windows(teacher, run, tmp_path):
    settings = {"model.mixer.window_tokens": 8, "model.mixer.sink_tokens": 2}
    assert export(stage(teacher, tmp_path / "windowed", **settings), tmp_path / "out") == 0
    assert export(run, tmp_path / "without") == 0
    row = "| softmax window beside each recurrence | 8 + 2 tokens |"
    assert row in (tmp_path / "out" / "README.md").read_text()
    assert "softmax window" not in (tmp_path / "without" / "README.md").read_text()


def test_a_stage_that_was_not_measured_says_so(teacher, tmp_path):
    run = stage(teacher, tmp_path / "run", heldout=None)
    assert export(run, tmp_path / "out") == 0
    row = "| align | not measured | not measured | not measured | 1,280 | 2 |"
    assert row in (tmp_path / "out" / "README.md").read_text()


def test_the_card_has_the_teachers_licence(run, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    licence = "license: other\nlicense_name: qwen\nlicense_link: https://example.org/licence"
    (other / "README.md").write_text(f"---\n{licence}\n---\n# Teacher\n")
    assert export(run, tmp_path / "out", "--teacher", other) == 0
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert (metadata["license"], metadata["license_name"]) == ("other", "qwen")
    assert "The teacher's: other (qwen), https://example.org/licence." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", ["---\nlicense: [\n---\n", "---\n- mit\n---\n", "# no metadata\n", "---\n"])
def test_a_readme_that_names_no_licence_is_no_error(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert read_licence(tmp_path) == Licence("mit")


def test_the_card_has_what_eval_and_longcontext_measured(run, tmp_path):
    score = {"task": "piqa", "metric": "acc", "value": 0.75, "stderr": 0.01, "num_questions": 9, "chance": 0.5}
    scores = [score | {"model": "teacher", "relative": None}, score | {"model": "run", "value": 0.7, "relative": 0.8}]
    (run / "eval.json").write_text(json.dumps({"scores": scores}))
    cells = [{"length_tokens": 512, "depth": depth, "num_right": 9, "num_samples": 10} for depth in (0.0, 1.0)]
    (run / "longcontext").mkdir()
    settings = dict.fromkeys(["num_samples", "seed", "text", "device", "dtype", "tasks"])
    measured = {"settings": settings, "models": {"student": {"passkey": cells}}}
    (run / "longcontext" / "longcontext.json").write_text(json.dumps(measured))
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| piqa | acc | 75.0% ± 1.0 | 70.0% ± 1.0 (80.0%) |" in card
    assert "| student | passkey | 512 | 90.0% of 20 |" in card


def test_an_export_of_an_export_keeps_what_its_card_tells(run, tmp_path):
    score = {"task": "a|b", "metric": "acc", "value": 0.75, "stderr": 0.01, "num_questions": 9, "chance": 0.5}
    (run / "eval.json").write_text(json.dumps({"scores": [score | {"model": "run", "relative": None}]}))
    assert export(run, tmp_path / "first", "--dtype", "bfloat16") == 0
    assert export(tmp_path / "first", tmp_path / "again", "--shard-size", "50KB") == 0
    first, again = ((tmp_path / name / "README.md").read_text() for name in ("first", "again"))
    assert again == first.replace("first", "again")
    assert "| a\\|b | acc | 75.0% ± 1.0 |" in again and "| align | 3.2500 |" in again
    assert "| weights | bfloat16, cast from float32 after the measurements |" in again
    assert export(tmp_path / "first", tmp_path / "wide", "--dtype", "float32") == 0
    told = "cast from bfloat16, cast from float32 after the measurements |"
    assert f"| weights | float32, {told}" in (tmp_path / "wide" / "README.md").read_text()
    assert export(tmp_path / "wide", tmp_path / "wider") == 0
    assert f"| weights | float32, {told}" in (tmp_path / "wider" / "README.md").read_text()


def test_an_export_of_an_export_keeps_its_hub_teacher_and_what_is_measured_anew(exported, teacher, tmp_path):
    card = (exported / "README.md").read_text()
    card = card.replace("library_name:", "base_model: owner/name\nlibrary_name:")
    (exported / "README.md").write_text(card.replace(f"| teacher | {teacher.name} |", "| teacher | owner/name |"))
    score = {"task": "piqa", "metric": "acc", "value": 0.75, "stderr": 0.01, "num_questions": 9, "chance": 0.5}
    (exported / "eval.json").write_text(json.dumps({"scores": [score | {"model": "out", "relative": None}]}))
    assert export(exported, tmp_path / "again") == 0
    assert metadata_load(tmp_path / "again" / "README.md")["base_model"] == "owner/name"
    again = (tmp_path / "again" / "README.md").read_text()
    assert "| teacher | owner/name |" in again
    assert "| piqa | acc | 75.0% ± 1.0 |" in again and "| align | 3.2500 |" in again


def test_the_card_of_somebody_elses_model_is_not_ours_to_repeat(exported, tmp_path):
    (exported / "README.md").write_text("---\nlicense: mit\n---\n# theirs\n\n## Tasks\n\nthe best\n")
    assert export(exported, tmp_path / "again") == 0
    assert "the best" not in (tmp_path / "again" / "README.md").read_text()


def test_the_stages_before_are_told_as_far_as_they_are_still_what_they_were(run, teacher, tmp_path):
    parent = f"somewhere/run sha256:{weights_hash(run)[:16]}"
    last = stage(teacher, tmp_path / "last", name="distill", parent=parent, **{"train.teacher.hf_path": ""})
    assert export(last, tmp_path / "out") == 0  # the teacher is the one that the stage before names
    assert "| align | 3.2500" in (tmp_path / "out" / "README.md").read_text()
    shutil.rmtree(run)
    stage(teacher, run, seed=1)
    assert export(last, tmp_path / "again", "--teacher", teacher) == 0
    assert "| align |" not in (tmp_path / "again" / "README.md").read_text()


def test_a_stage_that_ran_twice_has_two_rows(run, teacher, tmp_path):
    parent = f"somewhere/run sha256:{weights_hash(run)[:16]}"
    longer = stage(teacher, tmp_path / "longer", parent=parent, heldout=HELDOUT | {"loss": 2.5})
    assert export(longer, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| align run | 3.2500" in card
    assert "| align longer | 2.5000" in card


def test_a_conversion_is_its_last_stage_retied_if_it_was(teacher, tmp_path):
    folder = tmp_path / "conversion"
    first = stage(teacher, folder / "2-distill", name="distill")
    parent = f"2-distill sha256:{weights_hash(first)[:16]}"
    stage(teacher, folder / "3-extend", name="extend", parent=parent, seed=1)
    (folder / "conversion.json").write_text("{}")
    rows = {
        name: {"loss": 1.5, "kl": 0.5, "top1": 0.25} for name in ("teacher", "setup", "distill", "extend", "retied")
    }
    speeds = {name: {"100": 1.25} for name in ("student", "teacher")}
    (folder / "summary.json").write_text(json.dumps(rows | {"decode_ms": speeds}))
    assert export(folder, tmp_path / "out") == 0
    exported, last = load_model(tmp_path / "out"), load_model(folder / "3-extend")
    assert torch.equal(exported.model.layers[0].self_attn.g2, last.model.layers[0].self_attn.g2)
    assert exported.config.tie_word_embeddings and "lm_head.weight" not in SafetensorsFolder(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| distill | 1.5000 | 0.5000 | 25.0% | 1,280 | 2 |" in card
    assert "| retied | 1.5000 | 0.5000 | 25.0% | none | none |" in card
    assert "| student | 1.25 |" in card


def test_an_export_can_be_exported_again_with_its_licence(exported, tmp_path):
    card = (exported / "README.md").read_text()
    (exported / "README.md").write_text(card.replace("license: unknown", "license: mit"))
    assert export(exported, tmp_path / "again", "--dtype", "float16") == 0
    assert SafetensorsFolder(tmp_path / "again").info("model.norm.weight").dtype == torch.float16
    assert metadata_load(tmp_path / "again" / "README.md")["license"] == "mit"


def test_of_a_teacher_on_the_hub_no_weights_are_fetched(run, teacher, tmp_path, monkeypatch):
    hub, asked = shutil.copytree(teacher, tmp_path / "hub"), []
    (hub / "README.md").write_text("---\nlicense: mit\n---\n")
    (hub / "NOTICE").write_text("of the teacher")

    def fetched(name, allow_patterns):
        asked.append(name)
        folder = tmp_path / "cache"
        folder.mkdir()
        for path in filter_repo_objects([path.name for path in hub.iterdir()], allow_patterns=allow_patterns):
            shutil.copyfile(hub / path, folder / path)
        return str(folder)

    monkeypatch.setattr("radlads.checkpoint.hub_folder.snapshot_download", fetched)
    assert export(run, tmp_path / "out", "--teacher", "owner/name") == 0
    assert asked == ["owner/name"]
    got = {path.name for path in (tmp_path / "cache").iterdir()}
    assert got == {path.name for path in hub.iterdir()} - {"model.safetensors"}
    assert (tmp_path / "out" / "NOTICE").is_file()
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert (metadata["license"], metadata["base_model"]) == ("mit", "owner/name")


# What is refused; nothing is left behind


def test_tampered_weights_are_refused(run, tmp_path, capsys):
    weights = run / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not the file its manifest.json describes" in refused(capsys, run, tmp_path / "out")
    assert "is not the file its manifest.json describes" in refused(capsys, run, "--check", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_comes_back_different_is_not_published(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_module, "reloaded_logits", lambda *_: torch.zeros(1))
    assert "gives other logits than the model" in refused(capsys, run, tmp_path / "out")
    monkeypatch.setattr(export_module, "reloaded_logits", lambda *_: torch.tensor(torch.nan))
    assert "gives other logits than the model" in refused(capsys, run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_existing_folder_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "out exists already: remove it" in refused(capsys, run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_finished_run_is_refused(run, tmp_path, capsys):
    assert "is no run: name the folder of a conversion" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "conversion.json").write_text("{}")
    assert "is an unfinished conversion" in refused(capsys, tmp_path, tmp_path / "out")


def test_an_unknown_teacher_is_asked_for(teacher, tmp_path, capsys):
    unnamed = stage(teacher, tmp_path / "unnamed", **{"train.teacher.hf_path": ""})
    assert "does not say who its teacher was: name its folder" in refused(capsys, unnamed, tmp_path / "out")
    moved = stage(teacher, tmp_path / "moved")
    text = (moved / "config.yaml").read_text().replace(str(teacher), str(tmp_path / "gone"))
    (moved / "config.yaml").write_text(text)
    assert "gone is no folder, GGUF file, named model" in refused(capsys, moved, tmp_path / "out")
    assert export(moved, tmp_path / "out", "--teacher", teacher) == 0


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path, capsys):
    other = tiny.teacher_folder(tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"]["too far"] = 1000
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "belongs to another model" in refused(capsys, run, tmp_path / "out", "--teacher", other)


def test_options_that_do_not_go_together(run, tmp_path, capsys):
    assert "name the folder to write" in refused(capsys, run)
    assert "belong to --push-to-hub" in refused(capsys, run, tmp_path / "out", "--dry-run")
    for option in (["--dtype", "bfloat16"], ["--for-llama-cpp"], ["--shard-size", "1GB"], ["--teacher", run]):
        assert "is uploaded as it is" in refused(capsys, run, "--push-to-hub", "me/model", "--dry-run", *option)
    assert "--check writes nothing" in refused(capsys, run, tmp_path / "out", "--check", "gguf")
    assert "a shard's size is given as" in refused(capsys, run, tmp_path / "out", "--shard-size", "many")


# vLLM


def test_vllm_serves_our_mixers_by_heads(run, run6, capsys):
    assert export(run, "--check", "vllm") == export(run6, "--check", "vllm") == 0
    said = capsys.readouterr().out
    assert said.count("vLLM can serve this model") == 2
    assert "--tensor-parallel-size may be 1, 2\n" in said


# llama.cpp


def test_a_suitable_model_is_written_as_llama_cpp_wants_it(run6, tmp_path, capsys):
    assert export(run6, "--check", "gguf") == 0
    assert "llama.cpp can run this model" in capsys.readouterr().out
    assert export(run6, tmp_path / "out", "--for-llama-cpp") == 0
    assert "convert_hf_to_gguf.py" in capsys.readouterr().out
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == ["RWKV6Qwen2ForCausalLM"]
    assert "convert_hf_to_gguf.py" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(*(logits_of(load_model(folder), [1, 2, 3]) for folder in (run6, tmp_path / "out")))


def test_llama_cpp_gets_the_head_and_the_token_shift_that_a_model_lacks(tmp_path):
    tied = tiny.teacher_folder(tmp_path / "tied", tied=True)
    run = stage(tied, tmp_path / "run", **RWKV6 | {"model.use_tokenshift": 0})
    assert export(run, tmp_path / "stock") == 0
    assert export(tmp_path / "stock", tmp_path / "out", "--for-llama-cpp") == 0
    weights = SafetensorsFolder(tmp_path / "out")
    assert "lm_head.weight" in weights
    assert not weights["model.layers.0.self_attn.time_maa_w1"].any()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"use_rope": True}, "no RoPE"),
        ({"gate_rank_type": 2}, "full-rank gate only"),
        ({"balance_state": False}, "balances the state"),
        ({"groupnorm_att": True}, "no GroupNorm"),
        ({"qk_norm": True}, "no norms of queries and keys"),
        ({"head_dim": 24}, "share the hidden size evenly"),
        ({"time_mixers": ["rad_rwkv6", "rad_rwkv6", "qwen2"]}, "no softmax layers"),
        ({"time_mixers": ["rad_rwkv6", "mine", "rad_rwkv6"]}, "mixers of your own"),
        ({"mixer_settings": {"rad_rwkv6": {"window_tokens": 4}}}, "no softmax window inside a recurrent layer"),
    ],
)
def test_a_model_that_llama_cpp_would_get_wrong_is_refused(changed, reason):
    suitable = {"time_mixers": ["rad_rwkv6"] * 3, "use_rope": False, "gate_rank_type": 1}
    check_runs(RadladsConfig(**tiny.SIZES, **suitable))
    with pytest.raises(ValueError, match=reason):
        check_runs(RadladsConfig(**tiny.SIZES | suitable | changed))


def test_rad_rwkv7_is_not_for_llama_cpp(run, tmp_path, capsys):
    assert export(run, "--check", "gguf") == 1
    assert "no RAD-RWKV7" in capsys.readouterr().out
    assert "no RAD-RWKV7" in refused(capsys, run, tmp_path / "out", "--for-llama-cpp")
    assert not list(tmp_path.glob("out*"))


def test_the_bound_on_the_decay_holds_and_is_reached(run6):
    model = load_model(run6)
    config, mixer = model.config, model.model.layers[1].self_attn
    for parameter in (mixer.time_decay, mixer.time_decay_w1, mixer.time_decay_w2):
        torch.nn.init.normal_(parameter)
    low = mixer.time_decay_w2.sign()[:, 7]  # the input that drives channel 7 furthest
    furthest = (mixer.time_decay.flatten() + low @ mixer.time_decay_w2)[7].exp().item()
    bound = fastest_decay(config, ModelWeights(model))
    assert bound >= furthest
    mixer.time_decay.data[..., 7] += 20
    assert fastest_decay(config, ModelWeights(model)) == pytest.approx(furthest * torch.e**20, rel=1e-4)


# The hub


@pytest.fixture(scope="module")
def exported_once(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    assert export(finished, out) == 0
    return out


@pytest.fixture
def exported(exported_once, tmp_path):
    return shutil.copytree(exported_once, tmp_path / "out")


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url, self.asked, self.status = f"http://127.0.0.1:{self.server_port}", {}, 200
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked[self.path] = body
        answer = {"url": f"{self.server.url}/me/model", "commitUrl": f"{self.server.url}/me/model/commit/1"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer["files"] = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
        content = json.dumps(answer | {"commitOid": "1" * 40}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_upload, "HfApi", partial(HfApi, endpoint=server.url))
    yield server
    server.shutdown()
    server.server_close()


def test_an_export_is_uploaded_whole(exported, hub, capsys):
    (exported / ".hidden").write_text("not this")
    assert export(exported, "--push-to-hub", "me/model", "--private") == 0
    assert f"uploaded to {hub.url}/me/model" in capsys.readouterr().out
    assert json.loads(hub.asked["/api/repos/create"])["name"] == "model"
    lines = [json.loads(line) for line in hub.asked["/api/models/me/model/commit/main"].splitlines()]
    paths = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert paths == {path.name for path in exported.iterdir()} - {".hidden"}


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(exported, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert export(exported, "--push-to-hub", "me/model", "--dry-run") == 0
    out = capsys.readouterr().out
    total = sum(path.stat().st_size for path in exported.iterdir())
    assert f"{(exported / 'model.safetensors').stat().st_size:,}  model.safetensors" in out
    assert f"{total:,}  in {len(list(exported.iterdir()))} files" in out
    assert hub.asked == {}


def test_the_card_of_an_upload_names_the_repository(run, tmp_path, hub):
    assert export(run, tmp_path / "out", "--push-to-hub", "me/model", "--dry-run") == 0
    assert 'from_pretrained("me/model"' in (tmp_path / "out" / "README.md").read_text()


def test_uploads_that_cannot_be_are_refused_before_anything_is_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    assert "no token for the hub" in refused(capsys, run, tmp_path / "out", "--push-to-hub", "me/model")
    assert "OWNER/NAME, not 'model'" in refused(capsys, run, tmp_path / "out", "--push-to-hub", "model")
    assert "repo" in refused(capsys, run, tmp_path / "out", "--push-to-hub", "me/my model").lower()
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_export_is_not_uploaded(run, hub, capsys):
    assert "is no exported model" in refused(capsys, run, "--push-to-hub", "me/model")
    assert hub.asked == {}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_export_is_neither_uploaded_nor_blessed_by_another(exported, tmp_path, hub, capsys, name):
    content = (exported / name).read_bytes()
    (exported / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    assert f"{name} is not the file its checksums.json" in refused(capsys, exported, "--push-to-hub", "me/model")
    assert hub.asked == {}
    if name == "model.safetensors":
        assert "its SHA-256 is another one" in refused(capsys, exported, tmp_path / "again")


@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_that_refuses_is_told_in_a_sentence(exported, hub, capsys, reachable):
    hub.status = 403
    if not reachable:
        hub.shutdown()
        hub.server_close()
    err = refused(capsys, exported, "--push-to-hub", "me/model")
    assert err.startswith("radlads: me/model could not be uploaded: ") and "try again from it" in err
    assert err.count("\n") == 1
