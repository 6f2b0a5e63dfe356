"""Stage 4: KL where the assistant writes, in conversations by themselves; the student's own rows; going on exactly."""

import csv
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from radlads.cli import main
from radlads.config.compare import deciding
from radlads.config.schema import TrainConfig, without_effect
from radlads.convert.hf_source import open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader, BinIdxWriter
from radlads.data.chat_rows import BY_STUDENT, TO_WRITE, ConversationRows, Conversations, as_row, flags
from radlads.distill.instruct import Instruct
from radlads.distill.stage import is_trainable
from radlads.train import on_policy, stopping
from radlads.train.checkpoints import snapshots
from radlads.train.cuda_graph import records_graph
from radlads.train.fit import run_stage
from radlads.train.lightning_module import StageModule
from radlads.train.on_policy import OnPolicy
from radlads.train.processes.group import ALONE

CONTEXT = 24
KEYS = {"model.ctx_len": CONTEXT, "train.my_exit_tokens": CONTEXT * 2 * 6, "train.micro_bsz": 2}
OWN_ROWS = {
    "train.on_policy_share": 0.5,
    "train.on_policy_every_steps": 4,
    "train.on_policy_max_tokens": 6,
    "train.heldout_every_steps": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.chat_corpus(folder / "chat")
    return folder


@pytest.fixture(scope="module")
def models(teacher):
    """By mixer, a student that differs from its teacher, and the teacher."""
    source, found = open_teacher(teacher), {}
    for mixer in ("rad_rwkv6", "rad_rwkv7", "qwen2"):
        torch.manual_seed(0)
        student = build_student(source, tiny.stage_config(teacher, "distill", **{"model.tmix": mixer}).model)[0]
        for parameter in student.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        found[mixer] = student, build_teacher(source)
    return found


def rows_of(data, num=4, **keys):
    rows = samples(data, num, **keys)
    return torch.stack([rows[i] for i in range(num)])


def samples(data, num=100, **keys):
    held = [(Conversations(BinIdxReader(data / "chat"), CONTEXT), Fraction(1))]
    return ConversationRows(held, CONTEXT, num_samples=num, seed=1, **keys)


def by_hand(student, teacher, rows, divergence):
    """The sum and count of the loss, conversation by conversation."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, own, begins, _ = flags(row)
        for piece in torch.tensor_split(torch.arange(len(row)), begins.nonzero().flatten()):
            if len(piece) < 2:
                continue
            text, learnt = ids[piece][None], own[piece][1:]
            p, q = (F.log_softmax(model(text[:, :-1]).logits[0], -1)[learnt] for model in (student, teacher))
            forward, reverse = (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()
            total = total + {"forward": forward, "reverse": reverse, "mixed": (forward + reverse) / 2}[divergence]
            count += int(learnt.sum())
    return total, count


@pytest.mark.parametrize(
    ("mixer", "divergence"),
    [("rad_rwkv7", "forward"), ("rad_rwkv7", "reverse"), ("rad_rwkv6", "mixed"), ("qwen2", "mixed")],
)
def test_the_loss_is_the_divergence_where_the_assistant_writes(models, data, mixer, divergence):
    student, teacher = models[mixer]
    rows = rows_of(data)
    rows[1::2] |= BY_STUDENT
    student.zero_grad()
    on, off = Instruct(on_policy=True, divergence=divergence).parts(student, teacher, rows)
    assert (on.name, off.name, on.objective) == ("student_rows", "teacher_rows", None)
    off.objective.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected = by_hand(student, teacher, rows[1::2], divergence), by_hand(student, teacher, rows[::2], "forward")
    sum(total for total, _ in expected).backward()
    for part, (total, count) in zip((on, off), expected, strict=True):
        assert part.count == count > 0
        assert part.sum.item() == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-7, name


def test_without_own_rows_there_is_one_part_and_questions_count_nothing(models, data):
    student, teacher = models["rad_rwkv7"]
    rows = rows_of(data)
    (part,) = Instruct(on_policy=False).parts(student, teacher, rows)
    total, count = by_hand(student, teacher, rows, "forward")
    assert (part.name, part.count) == ("loss", count) and part.sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert part.count == sum(int((own & ~begins).sum()) for _, own, begins, _ in map(flags, rows))
    (same,) = Instruct(on_policy=False).parts(teacher, teacher, rows)
    assert abs(same.sum.item()) < 1e-4


def test_another_conversation_changes_nothing_in_the_next(models):
    student, teacher = models["rad_rwkv7"]
    second = np.arange(8), np.arange(8) >= 3
    losses = []
    for token in (5, 70):
        quiet = np.full(6, token), np.zeros(6, dtype=bool)
        (part,) = Instruct(on_policy=False).parts(student, teacher, as_row([quiet, second], 20)[None])
        losses.append(part.sum.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def stage(teacher, data, folder, **keys):
    """Run the stage, or go on with it; returns what the console was told."""
    config = tiny.stage_config(data, "instruct", **(KEYS | keys))
    source, console = open_teacher(teacher), tiny.Silent()
    torch.manual_seed(0)
    student = build_student(source, config.model)[0]
    run_stage(config, student, build_teacher(source), folder, console, parent="test")
    return console.lines


def column(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_stage_learns(teacher, data, tmp_path):
    more = {"train.my_exit_tokens": CONTEXT * 4 * 40, "train.micro_bsz": 4, "train.lr_init": 3e-3}
    stage(teacher, data, tmp_path / "run", **more)
    losses = column(tmp_path / "run", "loss")
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_stopped_run_ends_as_one_that_never_stopped(teacher, data, tmp_path, monkeypatch, step):
    if not (data / "straight").exists():
        stage(teacher, data, data / "straight", **OWN_ROWS)
    earlier = StageModule.training_step

    def training_step(self, tokens, batch_idx):
        self.stop.agreed = stopping.SIGNALS[0] if self.steps_done == step - 1 else None
        return earlier(self, tokens, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", training_step)
        with pytest.raises(stopping.Stopped):
            stage(teacher, data, tmp_path / "run", **OWN_ROWS)
    (checkpoint,) = snapshots.checkpoints_in(tmp_path / "run.partial")
    assert (checkpoint / snapshots.WRITTEN).is_file() == (step % 4 != 0)
    assert "going on after step" in stage(teacher, data, tmp_path / "run", **OWN_ROWS)[0]
    for name in ("loss", "student_rows", "teacher_rows", "grad_norm"):
        assert column(tmp_path / "run", name) == column(data / "straight", name)
    found, expected = (load_file(run / "model.safetensors") for run in (tmp_path / "run", data / "straight"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def policy(data, num_steps=6, processes=ALONE, **keys):
    train = tiny.stage_config(data, "instruct", **(KEYS | OWN_ROWS | keys)).train
    rows = samples(data, on_policy_share=Fraction(train.on_policy_share).limit_denominator(100))
    return OnPolicy(train, rows, num_steps=num_steps, sequences=2, processes=processes), rows


def test_own_rows_are_the_students_replies_to_the_corpuss_beginnings(models, data):
    student, _ = models["rad_rwkv7"]
    writer, rows = policy(data, **{"train.on_policy_temperature": 0.0})
    batch = torch.stack([rows[i] for i in range(4)])
    filled = writer.fill(batch, student, 0)
    assert torch.equal(filled[::2], batch[::2]) and (batch[1::2] & TO_WRITE).all()
    held = rows.corpora[0]
    known = {tuple(held.beginning(i, choice).tolist()) for i in range(len(held)) for choice in (0.0, 0.99)}
    num = 0
    for row in filled[1::2]:
        ids, own, begins, by_student = flags(row)
        for piece in torch.tensor_split(torch.arange(len(row)), begins.nonzero().flatten()):
            if not len(piece) or not own[piece].any():
                continue
            first = int(own[piece].int().argmax())
            prompt, reply = ids[piece][:first].tolist(), ids[piece][first:].tolist()
            assert tuple(prompt) in known and by_student[piece].all()
            with torch.no_grad():
                likeliest = student(ids[piece][None]).logits[0].argmax(-1).tolist()
            assert reply == likeliest[first - 1 : -1]
            assert len(reply) == 6 or reply[-1] == 256 or len(prompt) + len(reply) == CONTEXT + 1
            num += 1
    assert num >= 2


def test_own_rows_follow_from_weights_seed_and_window(models, data):
    student, _ = models["rad_rwkv7"]

    def written(step, seed=1337):
        writer, rows = policy(data, **{"train.seed_everything": seed})
        return writer.fill(torch.stack([rows[i] for i in range(2 * step, 2 * step + 8)]), student, step)

    assert torch.equal(written(0), written(0))
    assert not torch.equal(written(0)[1::2], written(0, seed=7)[1::2])
    assert not torch.equal(written(0)[1::2], written(4)[1::2])


def test_a_run_that_goes_on_in_a_smaller_window_decodes_as_many_at_a_time(models, data):
    student, _ = models["rad_rwkv7"]
    sizes = []
    for step in (0, 4):  # of a window of 4 steps, and of the last, of one
        writer, rows = policy(data, num_steps=5, **{"train.on_policy_every_steps": 4})
        writer.fill(torch.stack([rows[i] for i in range(2 * step, 2 * step + 2)]), student, step)
        sizes.append(writer._writer._rows)
    assert sizes[0] == sizes[1]


def test_own_rows_of_a_student_that_keeps_a_softmax_layer(teacher, data, tmp_path):
    keys = {"model.softmax_layers": "1", "train.trainable": "no_softmax"}
    stage(teacher, data, tmp_path / "run", **(OWN_ROWS | keys))
    source = open_teacher(teacher)
    before = build_teacher(source).state_dict()
    after = load_file(tmp_path / "run" / "model.safetensors")
    kept = [name for name in after if ".layers.1.self_attn." in name]
    assert kept and all(torch.equal(after[name], before[name]) for name in kept)
    assert not torch.equal(after["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


def test_what_no_softmax_trains(teacher):
    config = tiny.stage_config(teacher, "instruct", **{"model.softmax_layers": "1"})
    student = build_student(open_teacher(teacher), config.model)[0]
    frozen = [name for name, _ in student.named_parameters() if not is_trainable(name, student, "no_softmax")]
    assert frozen and all(name.startswith("model.layers.1.self_attn.") for name in frozen)


def test_replies_without_an_end_of_their_own_are_refused(data, tmp_path):
    draw = np.random.default_rng(0)
    with BinIdxWriter(tmp_path / "chat", tiny.VOCAB, masked=True) as writer:
        for _ in range(300):
            writer.add_document(draw.integers(0, 200, 9), np.arange(9) > 4)
    with pytest.raises(ValueError, match=r"chat.bin end in no token of their own.*or set train.on_policy_share 0"):
        policy(tmp_path)
    assert on_policy._stop_ids(samples(data)) == [256]


def test_a_corpus_without_a_mask_is_refused(teacher, corpus_folder, tmp_path):
    with pytest.raises(ValueError, match=r"train.mask is missing.*radlads data write"):
        stage(teacher, corpus_folder, tmp_path / "run", **{"train.data_file": str(corpus_folder / "train")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"reset_state_at_eos": 1}, "train.reset_state_at_eos must be 0 in the instruct stage"),
        ({"mask_labels_at_eos": 1}, "train.mask_labels_at_eos must be 0 in the instruct stage"),
        ({"heldout_tail_tokens": 9}, "set train.validation_data_file"),
        ({"cuda_graphs": "always"}, "with train.attention_distillation_stage 4"),
        ({"on_policy_share": 1.5}, "train.on_policy_share must be between 0 and 1"),
    ],
)
def test_settings_that_do_not_go_with_the_stage(keys, expected):
    with pytest.raises(ValueError, match=expected):
        TrainConfig(attention_distillation_stage=4, **keys)


def test_settings_of_the_stage_are_idle_elsewhere_and_decide_nothing_at_their_defaults(data, models):
    config = tiny.stage_config(data, "distill", **{"train.on_policy_share": 0.5})
    assert "train.on_policy_share" in without_effect(config)
    assert not any("on_policy" in key for key in deciding(tiny.stage_config(data, "instruct")))
    instruct = tiny.stage_config(data, "instruct").train
    assert not records_graph(instruct, Instruct(on_policy=False), models["rad_rwkv7"][0], compiled=True)


def test_train_runs_the_stage(teacher, data, tmp_path, capsys):
    from radlads.checkpoint.model_folder import save_model

    save = tmp_path / "student"
    save.mkdir()
    student = build_student(open_teacher(teacher), tiny.stage_config(data, "align").model)[0]
    save_model(student, save)
    keys = {
        "model.ctx_len": CONTEXT,
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        "train.attention_distillation_stage": 4,
        "train.load_model": save,
        "train.data_file": data / "chat",
        "train.teacher.hf_path": teacher,
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.micro_bsz": 2,
        "train.my_exit_tokens": CONTEXT * 4,
        "train.proj_dir": tmp_path,
        "train.proj_name": "4-instruct",
        "train.on_policy_share": 0.5,
        "train.on_policy_max_tokens": 4,
    }
    assert main(["train", *(f"--{key}={value}" for key, value in keys.items())]) == 0, capsys.readouterr().err
    assert (tmp_path / "4-instruct" / "manifest.json").is_file()
