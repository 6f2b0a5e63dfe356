"""What `radlads plan` predicts: peaks against those measured, laws of sharding, hours, and its sentences."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from radlads.cli import main
from radlads.convert.shapes import QWEN25, open_shape
from radlads.distill.stage import is_mixer_parameter
from radlads.model import rwkv7_triton
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM
from radlads.planning.activations import channel_mixer_kept, mixer_kept
from radlads.planning.machines import Machine
from radlads.planning.memory import Step, _logit_moments, host_bytes, largest_micro_batch, peak
from radlads.planning.models import Models, count_parameters
from radlads.planning.plan import PAPER_HOURS, RECIPES, Recipe, Request, largest_micro_batches, plan_stage
from radlads.planning.speed import MEASURED, SEVERAL_GPUS, share, stage_hours, step_of
from radlads.train.logging.gpus import GPUS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DISTILL = Step(stage="distill", sequences=12, sequence_tokens=512)
NAMES = [
    f"{row.stage}_{row.sequences}x{row.sequence_tokens}_{row.checkpointing}_{row.teacher_precision}" for row in MEASURED
]


def models_of(size):
    return Models.of(open_shape(size, variant="group_norm"))


@pytest.fixture(scope="module")
def seven():
    return models_of("7b")


@pytest.fixture(scope="module")
def seventy_two():
    return models_of("72b")


@pytest.mark.parametrize("row", MEASURED, ids=NAMES)
def test_peaks_are_those_measured(row, seven):
    assert peak(seven, step_of(row)).total / 1e9 == pytest.approx(row.peak_gb, rel=0.01)


def test_the_page_says_what_is_predicted(seven):
    page = (BENCHMARKS.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    for row in MEASURED:
        predicted = peak(seven, step_of(row)).total / 1e9
        assert f"| {row.peak_gb} | {predicted:.2f} |" in page, row


def test_a_mixer_keeps_what_the_partitioner_kept(seven):
    # Bytes a token of the tensors that torch 2.13's min-cut partitioner keeps of Block.mixed at 7B's shape
    student = seven.shape.student
    assert mixer_kept(student, 1, wide=False) == 165_456
    assert mixer_kept(student, 0, wide=False) == 157_136
    assert mixer_kept(student, 1, wide=True) == 172_624
    shifted = open_shape("7b", mixer="rad_rwkv6", variant="balanced").student
    assert mixer_kept(shifted, 1, wide=False) == 198_784


def test_layers_yet_to_be_selected_are_planned_as_any_from_distill_on(capsys):
    named, auto = {"model.softmax_layers": "every:14"}, {"model.softmax_layers": "auto:2"}
    assert open_shape("7b", overrides=auto).student.to_dict() == open_shape("7b", overrides=named).student.to_dict()
    said = {}
    for layers in ("auto:2", "every:12", ""):
        assert main(["plan", "0.5b", "--set", f"model.softmax_layers={layers}"]) == 0
        stages = re.split(r"\n(?=align|distill|extend)", capsys.readouterr().out)
        said[layers] = {stage.partition(":")[0]: stage for stage in stages[1:]}
        assert ("align runs all layers" in stages[0]) == (layers == "auto:2")
        assert "docs/which_student.md" in stages[0]
    assert said["auto:2"]["align"] == said[""]["align"] != said["every:12"]["align"]
    assert said["auto:2"]["distill"] == said["every:12"]["distill"] != said[""]["distill"]


def test_the_fullest_moment_is_the_one_expected(seven):
    assert peak(seven, DISTILL).moment == "losses"
    assert "first layer" in peak(seven, replace(DISTILL, checkpointing="full")).moment
    extend = Step(stage="extend", sequences=1, sequence_tokens=16384, checkpointing="selective")
    assert peak(seven, extend).moment == "last layer's mixer backward"


def test_what_is_called_measured_is_what_was():
    table = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for row in MEASURED:
        assert f"| {row.tokens_per_s:,} | {row.peak_gb} |" in table, row
    latest = json.loads((BENCHMARKS / "results" / "h200.json").read_text(encoding="utf-8"))
    for name, values in latest.items():
        if name.startswith(("align", "distill", "extend")) and "window" not in name:
            rows = [row for row in MEASURED if f"{row.stage}_{row.sequences}x{row.sequence_tokens}" == name]
            assert (round(values["peak_gb"], 1), round(values["tokens_per_s"])) in [
                (row.peak_gb, pytest.approx(row.tokens_per_s, abs=1)) for row in rows
            ]


def test_the_shares_are_those_of_the_benchmark(seven):
    latest = json.loads((BENCHMARKS / "results" / "h200.json").read_text(encoding="utf-8"))
    extend = next(row for row in MEASURED if row.stage == "extend")
    # The benchmark counts the update's time too
    assert share(extend, seven) == pytest.approx(latest["extend_1x16384"]["share_of_ceiling"], rel=0.03)


def test_parameters_are_counted_where_they_lie():
    config = RadladsConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    counted = count_parameters(config)
    model = RadladsForCausalLM(config)
    assert counted.total + config.hidden_size == sum(parameter.numel() for parameter in model.parameters())
    aligned = sum(parameter.numel() for name, parameter in model.named_parameters() if is_mixer_parameter(name, model))
    assert sum(counted.mixers) == aligned
    assert counted.mixers[0] < counted.mixers[1] == counted.mixers[2]
    tied = count_parameters(RadladsConfig.from_dict(config.to_dict() | {"tie_word_embeddings": True}))
    assert (tied.head, tied.total) == (0, counted.total - counted.head)


def test_the_sizes_of_qwen25(seven):
    assert seven.teacher.total + 3584 == 7_615_616_512
    for size, billions in {"0.5b": 0.494, "1.5b": 1.544, "3b": 3.086, "14b": 14.77, "32b": 32.76, "72b": 72.71}.items():
        layers, C, F, heads, kv_heads, vocab, tied = QWEN25[size]
        kv = C // heads * kv_heads
        block = 2 * C * C + 2 * C * kv + C + 2 * kv + 3 * C * F + 2 * C
        assert (layers * block + (1 if tied else 2) * vocab * C) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_recurrence_keeps_what_is_counted():
    B, T, H, N = 2, 64, 3, 64
    inputs = [torch.empty(B, T, H, N, dtype=torch.bfloat16, device="meta") for _ in range(5)]
    inputs.insert(1, torch.empty(B, T, H, N, device="meta"))
    _, _, *kept = rwkv7_triton._forward_keeping(*inputs, None, None)
    L = rwkv7_triton.BFLOAT16.chunk
    counted = H * (2 * (5 * N + 2 * L + N * N / L) + 4 * N / L)
    assert sum(x.numel() * x.element_size() for x in kept) == B * T * counted


def test_the_channel_mixer_keeps_what_is_counted():
    config = RadladsConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    mlp = RadladsForCausalLM(config).model.layers[0].mlp.to(torch.bfloat16)
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mlp(torch.randn(2, 8, 32, dtype=torch.bfloat16, requires_grad=True))
    weights = {parameter.data_ptr() for parameter in mlp.parameters()}
    total = sum(x.numel() * x.element_size() for pointer, x in kept.items() if pointer not in weights)
    assert total == 2 * 8 * channel_mixer_kept(config)


def parts_of(models, strategy, **changes):
    step = replace(DISTILL, strategy=strategy, num_gpus=8, checkpointing="full", **changes)
    return peak(models, step).parts


def test_what_is_sharded_is_divided(seven):
    alone = peak(seven, replace(DISTILL, checkpointing="full")).parts
    assert parts_of(seven, "ddp") == alone
    sharded = parts_of(seven, "fsdp")
    for part in ("weights", "optimiser", "teacher"):
        assert sharded[part] == pytest.approx(alone[part] / 8)
    first, second, third = (parts_of(seven, f"deepspeed_stage_{stage}") for stage in (1, 2, 3))
    assert [third[part] for part in ("weights", "teacher")] == [second[part] / 8 for part in ("weights", "teacher")]
    assert third["optimiser"] == second["optimiser"] and third["gradients"] > second["gradients"]
    assert first["optimiser"] == second["optimiser"] == pytest.approx(12 * seven.student.total / 8)
    assert first["gradients"] > second["gradients"]


def test_stage_2_adds_its_share_of_the_gradients_up_in_fp32(seven):
    student, step = seven.student, replace(DISTILL, strategy="deepspeed_stage_2", num_gpus=8, checkpointing="full")
    whole = max(student.largest_block, student.head)
    most = peak(seven, replace(step, accumulates=True)).parts["gradients"]
    assert most == pytest.approx(4 * student.total / 8 + 2 * whole)


# docs/planning.md: size, layers, precision, stage, sequences a GPU at a time and its share of a step, GPUs, strategy,
# GB, bound
COMPARED = [
    ("0.5b", 24, "bf16", "distill", 12, 12, 1, "single", 23.91, 0.01),
    ("0.5b", 24, "bf16", "distill", 12, 24, 1, "single", 26.47, 0.01),
    ("0.5b", 24, "bf16", "distill", 12, 12, 2, "ddp", 23.91, 0.01),
    ("0.5b", 24, "bf16", "distill", 12, 12, 2, "fsdp", 21.00, 0.06),
    ("0.5b", 24, "bf16", "distill", 12, 12, 2, "deepspeed_stage_2", 17.98, 0.02),
    ("0.5b", 24, "bf16", "distill", 12, 12, 2, "deepspeed_stage_3", 19.45, 0.06),
    ("0.5b", 24, "bf16", "align", 12, 12, 1, "single", 5.95, 0.04),
    ("0.5b", 24, "bf16", "align", 12, 24, 1, "single", 5.97, 0.04),
    ("0.5b", 24, "bf16", "align", 12, 12, 2, "ddp", 5.95, 0.04),
    ("0.5b", 24, "bf16", "align", 12, 12, 2, "fsdp", 4.50, 0.08),
    ("7b", 8, "bf16-true", "distill", 12, 12, 1, "single", 40.03, 0.01),
    ("7b", 8, "bf16-true", "distill", 12, 12, 2, "fsdp", 31.34, 0.01),
    ("7b", 2, "bf16-true", "distill", 12, 12, 2, "fsdp", 15.96, 0.02),
    ("7b", 4, "bf16-true", "align", 12, 12, 1, "single", 11.63, 0.02),
    ("7b", 8, "bf16-true", "align", 12, 12, 1, "single", 16.24, 0.01),
    ("7b", 8, "bf16-true", "align", 12, 12, 2, "fsdp", 10.61, 0.04),
]


def cut_models(size, layers, folder):
    """Balanced models of a size with so many of its layers."""
    _, channels, inner, heads, kv_heads, vocabulary, tied = QWEN25[size]
    shape = {"num_hidden_layers": layers, "hidden_size": channels, "intermediate_size": inner}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    Qwen2Config(**shape, tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return Models.of(open_shape(str(folder), variant="balanced"))


@pytest.mark.parametrize(
    ("size", "layers", "precision", "stage", "sequences", "share", "gpus", "strategy", "measured_gb", "bound"), COMPARED
)
def test_other_sizes_and_strategies_take_what_was_measured(
    tmp_path, size, layers, precision, stage, sequences, share, gpus, strategy, measured_gb, bound
):
    step = Step(
        stage=stage,
        sequences=sequences,
        sequence_tokens=512,
        strategy=strategy,
        num_gpus=gpus,
        precision=precision,
        accumulates=share > sequences,
    )
    found = peak(cut_models(size, layers, tmp_path), step).total / 1e9
    assert found == pytest.approx(measured_gb, rel=bound)
    page = (BENCHMARKS.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    assert f"| {measured_gb:.2f} | {found:.2f} |" in page


def test_what_training_refuses_is_not_planned(seven):
    for strategy in ("fsdp", "deepspeed_stage_3"):
        with pytest.raises(ValueError, match=f"{strategy} has no fp8 teacher"):
            replace(request("distill", "h200", 8), strategy=strategy, teacher_precision="fp8", precision="bf16")
    with pytest.raises(ValueError, match=r"has no bf16-true.*add --precision bf16"):
        replace(request("distill", "h200", 8), strategy="deepspeed_stage_2")
    for strategy in ("deepspeed_stage_2", "deepspeed_stage_3"):
        wanted = replace(request("distill", "h200", 8), strategy=strategy, precision="bf16", checkpointing="full")
        assert plan_stage(seven, seven, wanted).largest.keys() == {"none", "selective", "full"}
    with pytest.raises(ValueError, match="one GPU has nothing to share out, as ddp would"):
        replace(request("distill", "h200", 1), strategy="ddp")
    auto = replace(request("distill", "h200", 8), strategy="auto", teacher_precision="fp8")
    assert plan_stage(seven, seven, auto).step.strategy == "ddp"


def test_fp32_weights_take_twice_as_much(seven):
    narrow, wide = parts_of(seven, "ddp"), parts_of(seven, "ddp", precision="bf16")
    for part in ("weights", "optimiser", "teacher"):
        assert wide[part] == 2 * narrow[part]
    zero, wide_zero = parts_of(seven, "deepspeed_stage_2"), parts_of(seven, "deepspeed_stage_2", precision="bf16")
    assert wide_zero == zero


def test_accumulation_keeps_all_gradients(seven):
    align = replace(DISTILL, stage="align", sequences=1, accumulates=True)
    assert peak(seven, align).parts["gradients"] == pytest.approx(2 * sum(seven.student.mixers))
    whole = peak(seven, replace(DISTILL, accumulates=True)).parts["gradients"]
    assert whole == pytest.approx(2 * (seven.student.total + seven.student.head))


def test_the_largest_micro_batch_is_the_last_that_fits(seven):
    usable = 100e9
    step = replace(DISTILL, checkpointing="selective")
    found = largest_micro_batch(seven, step, 96, usable)

    def total(sequences):
        return peak(seven, replace(step, sequences=sequences, accumulates=True)).total

    assert total(found) <= usable < total(found + 1)
    assert largest_micro_batch(seven, step, 96, 50e9) == 0
    assert largest_micro_batch(seven, step, 4, 1e12) == 4


def request(stage, kind, num_gpus, **changes):
    return Request(stage=stage, recipe=RECIPES[stage], machine=Machine(kind, num_gpus), **changes)


def test_seventy_two_billion_on_8_and_16_gpus(seventy_two):
    for stage in RECIPES:
        for num_gpus in (8, 16):
            for strategy in ("ddp", "deepspeed_stage_1", "deepspeed_stage_2"):
                most = largest_micro_batches(seventy_two, request(stage, "h200", num_gpus), strategy)
                assert not any(most.values()) or stage == "align"
            assert largest_micro_batches(seventy_two, request(stage, "h200", num_gpus), "fsdp").popitem()[1] > 0
    assert not any(largest_micro_batches(seventy_two, request("distill", "h100", 8), "fsdp").values())


def test_the_plan_is_the_quickest_that_fits(seven, seventy_two):
    plan = plan_stage(seven, seven, request("distill", "h200", 8))
    assert (plan.fits, plan.step.strategy, plan.step.checkpointing, plan.step.sequences) == (True, "ddp", "none", 12)
    plan = plan_stage(seventy_two, seven, request("distill", "h200", 8))
    assert (plan.fits, plan.step.strategy, plan.step.checkpointing) == (True, "fsdp", "full")
    assert not plan_stage(seventy_two, seven, request("distill", "h200", 1)).fits
    asked = plan_stage(seven, seven, request("distill", "h200", 8, micro_batch=3, checkpointing="full"))
    assert (asked.step.sequences, asked.step.checkpointing, asked.step.accumulates) == (3, "full", True)


def test_hours_repeat_what_was_measured(seven):
    for row in MEASURED:
        machine = Machine("h200", 1)
        hours = stage_hours(seven, seven, step_of(row), machine, batch=row.sequences, total_tokens=1e8)
        assert hours == pytest.approx(1e8 / row.tokens_per_s / 3600)


def test_hours_of_more_and_of_other_gpus(seven):
    def hours(kind, num_gpus):
        step = replace(DISTILL, num_gpus=num_gpus, strategy="ddp")
        return stage_hours(seven, seven, step, Machine(kind, num_gpus), batch=96, total_tokens=5e8)

    assert hours("h200", 8) == pytest.approx(hours("h200", 1) / 8 / SEVERAL_GPUS, rel=0.05)
    slower = GPUS["h200"].tflop_per_s / GPUS["a100"].tflop_per_s
    assert hours("a100", 1) == pytest.approx(slower * hours("h200", 1), rel=0.02)


def test_hours_are_shorter_than_the_papers_and_of_its_order(seven, seventy_two):
    for size, models in {"7b": seven, "72b": seventy_two}.items():
        for stage, paper in PAPER_HOURS[size].items():
            own = plan_stage(models, seven, request(stage, "mi300x", 8)).hours
            assert 1.5 < paper / own < 7


def test_a_host_holds_what_is_not_on_its_gpu_yet_or_ever(seven):
    def found(stage, strategy, teacher="same"):
        step = replace(DISTILL, stage=stage, strategy=strategy, teacher_precision=teacher, num_gpus=8)
        return host_bytes(seven, step)

    assert found("align", "ddp") == found("distill", "fsdp") == found("distill", "deepspeed_stage_3") == 0
    assert found("distill", "ddp", "fp8") == 4 * seven.teacher.total
    assert found("extend", "ddp", "fp8") == 0
    rows = 4 * (seven.student.total - sum(seven.student.mixers)) / 8
    assert found("align", "deepspeed_stage_2") == rows
    assert found("align", "deepspeed_stage_2", "fp8") == rows + 4 * seven.teacher.total


def test_the_command_says_all_of_it(teacher, capsys):
    assert main(["plan", str(teacher), "--gpus", "2", "--price", "2", "--batch", "8", "--tokens", "1M"]) == 0
    said = capsys.readouterr().out
    for text in (
        "on 2 x h200",
        "align:",
        "distill: 1M tokens",
        "fits:",
        "largest micro-batch",
        "costing",
        "fsdp",
        "assumed",
    ):
        assert text in said
    assert main(["plan", "7b", "--gpu", "h100", "--stage", "distill", "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "host memory" not in said
    assert main(["plan", "7b", "--gpus", "8", "--stage", "distill", "--teacher-precision", "fp8"]) == 0
    assert "host memory for models: 30.5 GB for each GPU's process, 244 GB in all" in capsys.readouterr().out
    assert "checked at 0.5B" in said
    assert "the paper's hours" in said
    assert "align" not in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["9b"], "no size, folder or file '9b': choose one of 0.5b,"),
        (["7b", "--stage", "finish"], "--stage must be one of align, distill, extend, all"),
        (["7b", "--strategy", "zero"], "--strategy must be one of auto, single, ddp"),
        (["7b", "--strategy", "single", "--gpus", "2"], "runs on one GPU"),
        (["7b", "--gpu", "v100"], "no GPU 'v100'"),
        (["7b", "--gpus", "0"], "--gpus must be 1 or more"),
        (["7b", "--price", "-1"], "--price must be 0 or more"),
        (["7b", "--tokens", "many"], "--tokens must be a number such as 500M"),
        (["7b", "--tokens", "nan"], "--tokens must be more than 0"),
        (["7b", "--batch", "0"], "--batch must be 1 or more"),
        (["7b", "--micro-batch", "97", "--stage", "distill"], "--micro-batch must be 1 to 96"),
        (["7b", "--gpu", "a100", "--teacher-precision", "fp8"], "no 8-bit products"),
        (["7b", "--mixer", "rwkv"], "no mixer named 'rwkv': use one of"),
        (["7b", "--mixer", "rad_rwkv6", "--variant", "group_norm"], "belongs to --mixer rad_rwkv7"),
        (["7b", "--mixer", "qwen2"], "no layer of this student has a mixer to align"),
        (["7b", "--set", "train.lr_init=1"], "only keys of the model section"),
        (["7b", "--variant", "x"], "--variant must be"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 2
    assert "not a model folder" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert main(["plan", str(tmp_path)]) == 2
    assert "BertModel" in capsys.readouterr().err


def test_a_batch_of_another_size_is_planned(seven):
    recipe = Recipe(1e8, 10, 512)
    plan = plan_stage(seven, seven, Request(stage="distill", recipe=recipe, machine=Machine("h200", 4)))
    assert plan.fits
    assert plan.step.sequences == 3


def test_softmax_layers_are_planned_as_what_they_are(seven):
    keys = {"model.preserve_last_n_layers": 4}
    mixed = Models.of(open_shape("7b", overrides=keys))
    assert mixed.aligned == seven.student.mixers[:24]
    assert mixed.student.total < seven.student.total
    align, whole = replace(DISTILL, stage="align"), peak(seven, replace(DISTILL, stage="align")).parts
    for part in ("optimiser", "gradients"):
        assert peak(mixed, align).parts[part] == pytest.approx(whole[part] * 24 / 28, rel=0.02)
    assert peak(mixed, DISTILL).total < peak(seven, DISTILL).total


def test_the_fullest_moment_may_lie_between_two_kinds_of_layers():
    models = Models.of(open_shape("7b", overrides={"model.preserve_last_n_layers": 1}))
    softmax, recurrent = (mixer_kept(models.shape.student, layer, wide=False) for layer in (27, 26))
    assert softmax < recurrent / 3
    names = {moment.name for moment in _logit_moments(models, DISTILL)}
    assert {"layer 26's mixer backward", "last layer's mixer backward", "first layer's mixer backward"} <= names


def test_a_plan_takes_keys_of_the_model_and_says_so(capsys):
    assert main(["plan", "0.5b", "--stage", "align", "--set", "model.preserve_last_n_layers=2"]) == 0
    said = capsys.readouterr().out
    assert "rad_rwkv7 with model.preserve_last_n_layers=2: activations counted from equations" in said
    assert main(["plan", "0.5b", "--stage", "distill", "--mixer", "qwen2"]) == 0
    assert "fits" in capsys.readouterr().out
