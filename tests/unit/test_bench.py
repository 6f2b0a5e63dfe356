"""What `radlads bench` counts, times, writes and says."""

import json
import math
import sys
import weakref
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from radlads.bench import train as bench_train_module
from radlads.bench.cases import DEFAULT_CASES, KINDS, decode_case, kernel_case, prefill_case, train_case, whole_number
from radlads.bench.costs import decode_state_bytes, prefill_flops, recurrence_bytes
from radlads.bench.kernels import StillTuning, tuning_limit
from radlads.bench.measure import Timing, timed
from radlads.bench.models import random_model, weight_bytes
from radlads.bench.record import LATEST, Row, checkout_commit, merge_results
from radlads.bench.run import Bench, _prepare_outputs
from radlads.cli import main
from radlads.convert.shapes import open_shape
from radlads.distill.arithmetic import mixer_weights, train_flops
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.optimizers.step import GradientNorms

CPU = torch.device("cpu")
TIMING = Timing(median_ms=10.0, min_ms=9.0, max_ms=12.0, runs=3, warmup_s=1.0)


def shape_7b(mixer="rad_rwkv7"):
    return open_shape("7b", mixer=mixer)


def bench(*argv):
    return main(["bench", *map(str, argv), "--device", "cpu"])


def failing(capsys, *argv):
    assert bench(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("radlads: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("stage", "tokens", "gflop"), [("align", 512, 18.6), ("distill", 512, 57.5), ("extend", 16384, 43.3)]
)
def test_arithmetic_of_a_training_step_at_7b(stage, tokens, gflop):
    shape = shape_7b()
    assert train_flops(stage, shape.student, shape.teacher, tokens) / 1e9 == pytest.approx(gflop, rel=0.03)


def test_arithmetic_and_bytes_of_inference_at_7b():
    shape = shape_7b()
    assert prefill_flops(shape.student, 8192) / 1e9 == pytest.approx(13.4, rel=0.01)
    assert decode_state_bytes(shape.student, 512, 2) == decode_state_bytes(shape.student, 65536, 2) == 2 * 28**2 * 65536
    assert decode_state_bytes(shape.teacher, 65536, 2) == 28 * 2 * 512 * 65536 * 2


@pytest.mark.parametrize("gate", [0, 1, 2])
@pytest.mark.parametrize("mixer", ["qwen2", "rad_rwkv6", "rad_rwkv7"])
def test_the_counted_weights_are_the_matrices_of_the_mixers(mixer, gate):
    config = RadladsConfig(
        hidden_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=2, vocab_size=8,
        intermediate_size=64, time_mixers=[mixer] * 2, gate_rank_type=gate,
    )  # fmt: skip
    with torch.device("meta"):
        model = RadladsForCausalLM(config)
    for layer, block in enumerate(model.model.layers):
        matrices = [x for x in block.self_attn.parameters() if x.numel() > max(x.shape)]
        counted = mixer_weights(config, layer)
        assert counted.at_input + counted.inside == sum(x.numel() for x in matrices)


def test_ideal_bytes_of_a_recurrence():
    assert recurrence_bytes("gla", (1, 1, 1, 1), backward=False) == 3 * 2 + 4 + 2
    assert recurrence_bytes("rwkv7", (2, 3, 5, 7), backward=True) == 210 * (14 + 2 + 14 + 2 + 14)


def test_warm_up_is_not_timed():
    calls = []
    timing = timed(lambda: calls.append(len(calls)), CPU, warmup=2, runs=5)
    assert len(calls) == 7
    assert timing.runs == 5
    assert timing.min_ms <= timing.median_ms <= timing.max_ms


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_random_weights_leave_nothing_at_zero(mixer):
    config = open_shape("tiny", mixer=mixer, variant=None).student
    model = random_model(config, device=CPU, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.isfinite(parameter).all(), name
        assert (parameter != 0).float().mean() > 0.9, name
    assert model.model.norm.weight.float().mean().item() == pytest.approx(1, abs=0.02)
    assert weight_bytes(model) == 2 * sum(parameter.numel() for parameter in model.parameters())


def test_random_weights_are_those_of_a_student_in_use():
    mixer = random_model(open_shape("tiny").student, device=CPU, dtype=torch.float32).model.layers[1].self_attn
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.w0))
    assert 0.95 < decay.median() < 1
    assert mixer.v0.mean().item() == pytest.approx(1, abs=0.02)
    assert mixer.ln_x.weight.mean().item() == pytest.approx(1, abs=0.02)


OWN = """
import torch
from torch import nn

class TMix_{name}(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.share = nn.Parameter(torch.full((config.hidden_size,), 0.25))
        self.register_buffer("seven", torch.full((3,), 7.0))

    def forward(self, x, state, v_first, shared):
        return self.v_proj(x) * self.share * self.seven.mean(), state, v_first
"""


@pytest.fixture
def own_mixer(tmp_path, monkeypatch):
    """The name of a mixer that carries nothing and says nothing of itself, and the folder of its file."""
    name = f"own{abs(hash(tmp_path))}"
    (tmp_path / "mixers" / "tmix").mkdir(parents=True)
    (tmp_path / "mixers" / "tmix" / f"tmix_{name}.py").write_text(OWN.format(name=name))
    for module in [key for key in sys.modules if key.partition(".")[0] == "tmix"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name, tmp_path / "mixers"


def test_a_mixer_of_ones_own_begins_as_it_says(own_mixer):
    name, folder = own_mixer
    sys.path.insert(0, str(folder))
    model = random_model(open_shape("tiny", mixer=name).student, device=CPU, dtype=torch.bfloat16)
    for block in model.model.layers:
        assert block.self_attn.seven.tolist() == [7, 7, 7]
        assert block.self_attn.share.float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert block.self_attn.share.float().std() > 0.01


def test_any_mixer_is_measured_and_planned(own_mixer, tmp_path, capsys):
    name, folder = own_mixer
    chosen = ["--mixer", name, "--mixer-path", folder]
    where = [*chosen, "--layers", 3, "--set", "model.preserve_last_n_layers=1", "--json", tmp_path / "record.json"]
    assert bench("train", *where, "--cases", "align_1x16,distill_1x16") == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [case["case"] for case in record["cases"] if "median_ms" in case] == ["align_1x16", "distill_1x16"]
    assert (record["mixer"], record["variant"]) == (name, None)
    assert main(["plan", "0.5b", *map(str, chosen)]) == 0
    said = capsys.readouterr().out
    assert f"{name}: of activations only the inputs and outputs of its matrices are counted" in said
    assert "fits" in said


def test_cases_are_read_from_their_names():
    assert (train_case("extend_1x16k").stage, train_case("extend_1x16k").tokens) == ("extend", 16384)
    assert (prefill_case("prefill_8k").piece, prefill_case("prefill_8k_by_2k").piece) == (8192, 2048)
    assert (decode_case("decode_b32").batch, decode_case("decode_b32").position) == (32, 512)
    assert kernel_case("gla_1x16384x28x128").shape == (1, 16384, 28, 128)
    read = {"train": train_case, "prefill": prefill_case, "decode": decode_case, "kernels": kernel_case}
    names = [read[kind](name).name for kind in KINDS for name in DEFAULT_CASES[kind]]
    assert set(LATEST) <= set(names)


@pytest.mark.parametrize("text", ["0", "k", "-1", "8m"])
def test_a_wrong_number_is_refused(text):
    with pytest.raises(ValueError, match="512 or 8k"):
        whole_number(text)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("train", {("align_2x64", "student"), ("distill_2x64", "student"), ("extend_1x128", "student")}),
        ("prefill", {(f"prefill_128{by}", of) for by in ("", "_by_32") for of in ("student", "teacher")}),
        ("decode", {(f"decode_b{batch}_64", of) for batch in (1, 4) for of in ("student", "teacher")}),
        ("kernels", {("rwkv7_2x64x2x32", "chunked fwd"), ("gla_2x64x2x32", "chunked fwd+bwd")}),
    ],
)
def test_every_kind_runs_without_a_gpu(tmp_path, capsys, kind, expected):
    assert bench(kind, "--json", tmp_path / "new" / "record.json", "--commit", "abc") == 0
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    measured = {(case["case"], case["of"]): case for case in record["cases"] if "median_ms" in case}
    assert expected <= set(measured)
    assert all(case["tokens_per_s"] > 0 and case["share_of_ceiling"] > 0 for case in measured.values())
    assert record["commit"] == "abc"
    assert {"torch", "triton", "transformers", "fla-core"} <= set(record["versions"])
    assert record["shape"]["name"] == "tiny" and record["ceilings"]["copy_gb_per_s"] > 0
    table = capsys.readouterr().out
    assert all(case in table for case, _ in expected)


def test_a_backend_that_is_not_there_is_a_row(tmp_path):
    assert bench("kernels", "--json", tmp_path / "record.json") == 0
    rows = json.loads((tmp_path / "record.json").read_text())["cases"]
    absent = {(row["case"], row["of"]): row["problem"] for row in rows if "problem" in row}
    cases = ("rwkv7_2x64x2x32", "gla_2x64x2x32")
    assert set(absent) == {(case, backend) for case in cases for backend in ("triton", "fla")}
    assert all("CUDA" in problem for problem in absent.values())


def test_backends_by_name(tmp_path, capsys):
    assert bench("kernels", "--backends", "chunked", "--json", tmp_path / "record.json") == 0
    rows = json.loads((tmp_path / "record.json").read_text())["cases"]
    assert {row["backend"] for row in rows} == {"chunked"}
    assert bench("kernels", "--backends", "cuda") == 2
    assert "there is no backend 'cuda': --backends takes triton, fla, chunked" in capsys.readouterr().err


def test_one_case_by_its_sizes_and_a_shape_from_a_folder(teacher, tmp_path):
    where = ["--shape", teacher, "--json", tmp_path / "record.json"]
    assert bench("prefill", *where, "--tokens", 24, "--piece", 8, "--no-teacher", "--mixer", "rad_rwkv6") == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(row["case"], row["of"]) for row in record["cases"]] == [("prefill_24_by_8", "student")]
    assert record["shape"]["hidden_size"] == 64
    assert bench("train", *where, "--stage", "extend", "--batch", 2, "--tokens", 16, "--layers", 1) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["cases"][0]["case"] == "extend_2x16"
    assert record["shape"]["num_hidden_layers"] == 1


def test_a_case_that_fails_lets_the_others_go_on(tmp_path, capsys, monkeypatch):
    backward_parts = bench_train_module.backward_parts

    def memory_for_few_tokens(stage, student, teacher, tokens):
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward_parts(stage, student, teacher, tokens)

    monkeypatch.setattr(bench_train_module, "backward_parts", memory_for_few_tokens)
    assert bench("train", "--cases", "distill_64x8,extend_1x16", "--json", tmp_path / "record.json") == 1
    failed, measured = json.loads((tmp_path / "record.json").read_text())["cases"]
    assert failed["failed"] and "lower --batch from 64" in failed["problem"]
    assert measured["median_ms"] > 0
    assert "1 of the cases failed" in capsys.readouterr().out


def test_the_teacher_is_let_go_when_no_case_needs_it(monkeypatch):
    backward_parts, teachers = bench_train_module.backward_parts, []

    def note(stage, student, teacher, tokens):
        if stage.name == "extend":
            assert [known() for known in teachers] == [None]
        elif not teachers:
            teachers.append(weakref.ref(teacher))
        return backward_parts(stage, student, teacher, tokens)

    monkeypatch.setattr(bench_train_module, "backward_parts", note)
    assert bench("train", "--cases", "distill_1x8,extend_1x8") == 0
    assert teachers


def test_a_step_that_is_not_finite_is_no_measurement(tmp_path, monkeypatch):
    norms = GradientNorms(torch.tensor(float("nan")), {})
    monkeypatch.setattr(bench_train_module, "optimizer_step", lambda *_, **__: norms)
    assert bench("train", "--cases", "extend_1x16", "--json", tmp_path / "record.json") == 1
    assert "norm is nan" in json.loads((tmp_path / "record.json").read_text())["cases"][0]["problem"]


def test_results_of_a_student_with_a_window_stand_beside_the_usual_ones(tmp_path):
    path = tmp_path / "results.json"
    row = Row(case="decode_b32", of="student", work={}, tokens=2048, timing=TIMING, share=0.5, peak_bytes=10**10)
    merge_results(path, [row], "first")
    window = Bench(kind="decode", overrides={"model.mixer.window_tokens": "64"}, results=path)
    merge_results(path, [row], "second", _prepare_outputs(window, "cuda", "7b"))
    assert {name: entry["commit"] for name, entry in json.loads(path.read_text()).items()} == {
        "decode_b32": "first",
        "decode_b32_window64": "second",
    }
    with pytest.raises(ValueError, match=r"of its keys only model\.mixer\.window_tokens"):
        _prepare_outputs(replace(window, overrides={"model.gate_rank_type": "1"}), "cuda", "7b")


def test_results_hold_the_latest_of_the_students_usual_cases(tmp_path):
    path = tmp_path / "results.json"
    numbers = {"work": {}, "tokens": 2048, "timing": TIMING, "share": 0.5, "peak_bytes": 10**10}
    merge_results(path, [Row(case="align_4x512", of="student", **numbers)], "first")
    merge_results(
        path,
        [
            Row(case="decode_b32", of="student", **numbers),
            Row(case="prefill_8k", of="teacher", **numbers),
            Row(case="align_5x512", of="student", **numbers),
            Row(case="align_4x512", of="student", work={}, problem="out of memory", failed=True),
        ],
        "second",
    )
    assert json.loads(path.read_text()) == {
        case: {"tokens_per_s": 204800.0, "peak_gb": 10.0, "share_of_ceiling": 0.5, "commit": commit}
        for case, commit in (("align_4x512", "first"), ("decode_b32", "second"))
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--cases", "align_4x512,aling_4x512"], "'aling_4x512': the cases of train are align_4x512, "),
        (["prefill", "--cases", "decode_b1"], "the cases of prefill are prefill_8k, "),
        (["decode", "--cases", "decode_b0"], "512 or 8k"),
        (["kernels", "--cases", ","], "names no case"),
        (["train", "--batch", "4", "--tokens", "512"], "--stage is needed"),
        (["train", "--stage", "align"], "--tokens is needed"),
        (["train", "--cases", "align_4x512", "--batch", "4"], "leave out --stage"),
        (["train", "--shape", "8b"], "choose one of 0.5b, 1.5b, 3b, 7b, 14b, 32b, 72b, tiny, "),
        (["train", "--layers", "0"], "--layers must be 1 or more"),
        (["decode", "--mixer", "mamba"], "no mixer named 'mamba': use one of qwen2, rad_rwkv6, rad_rwkv7"),
        (["decode", "--variant", "tall"], "--variant must be one of balanced, group_norm, not 'tall'"),
        (["decode", "--mixer", "rad_rwkv6", "--variant", "group_norm"], "belongs to --mixer rad_rwkv7"),
        (["decode", "--set", "train.lr_init=1"], "only keys of the model section"),
        (["decode", "--set", "model.tmix=rad_rwkv6"], "name the mixer with --mixer"),
        (["decode", "--set", "model.gate_rank=1"], "did you mean 'model.gate_rank_type'"),
        (["decode", "--results", "results.json"], "leave --results out"),
    ],
)
def test_mistakes_are_one_sentence(capsys, argv, message):
    assert message in failing(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence(capsys):
    assert main(["bench", "decode", "--device", "cuda"]) == 2
    assert "choose --device cpu" in capsys.readouterr().err


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkout_commit() is None


@pytest.fixture
def autotuner(monkeypatch):
    """A stand-in for Triton's autotuner, which is not there without a GPU; it says what it is asked to try."""

    class Autotuner:
        def _bench(self, *args, **keys):
            return args, keys

    module = ModuleType("triton.runtime.autotuner")
    module.Autotuner = Autotuner
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Autotuner


def test_tuning_ends_at_its_limit_and_the_autotuner_is_what_it_was(autotuner, monkeypatch):
    now, before = [100.0], autotuner._bench
    monkeypatch.setattr("radlads.bench.kernels.time.monotonic", lambda: now[0])
    with pytest.raises(StillTuning, match="still tuning itself after 120 s"), tuning_limit(120):
        now[0] = 220.0
        assert autotuner()._bench(1, warps=2) == ((1,), {"warps": 2})
        now[0] = 220.1
        autotuner()._bench(1, warps=4)
    assert autotuner._bench is before


def test_tuning_in_time_leaves_the_autotuner_as_it_was(autotuner):
    before = autotuner._bench
    with tuning_limit(120):
        assert autotuner._bench is not before
    assert autotuner._bench is before
