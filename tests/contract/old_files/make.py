"""Write the files that the code of another commit leaves, which tests then read with today's (test_old_files.py).

    git worktree add --detach /tmp/old COMMIT
    python tests/contract/old_files/make.py /tmp/old tests/contract/old_files/COMMIT

OUT must not exist. Needs DeepSpeed and today's packages, and two minutes on two cores. The commit's own commands and
its tests/distributed/stages.py train, export and generate, with OUT as the working directory, so that all paths in the
files are relative. At the end three things are removed: TensorBoard's files, whose names hold the machine's; the model
code in exports, 125 kB each, as tests load config.json and weights by today's classes; and the runs of unfinished/ that
came to their end.

    teacher/ corpus/         what all stages learn from: 2 layers, 32 channels, 2 heads of 16, 32 tokens
    stages/MODEL/STAGE/      finished stages of four models: align, distill
    unfinished/RUN.partial/  runs that a SIGTERM stopped after 3 of 6 steps: of one process, and of two by 4 strategies
    exports/MODEL/           `radlads export --dtype bfloat16` of the last stage, without its code
    states/MODEL.state       `radlads generate --save-state` with such an export
    expected/                logits.safetensors: by folder. RUN.csv, RUN.safetensors, alone-heldout.csv: a run's end.
                             texts.json: what `radlads generate --load-state` prints
"""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

VOCAB, END = 32, 31
LETTERS = "abcdefghijklmnopqrstuvwxyz.,?'Ġ"
TOKENS_PER_STEP = 16 * 4
MODELS = {
    "rwkv6": {"model.tmix": "rad_rwkv6"},
    "rwkv7-balanced": {},
    "rwkv7-groupnorm": {"model.balance_state": 0, "model.groupnorm_att": 1},
    "hybrid": {"model.preserve_last_n_layers": 1},
}
# The hybrid's layers as released files write them
SPELT_OTHERWISE = {"model.preserve_last_n_layers": 0, "model.tmix2": "qwen2", "model.inv_other_layer_ratio": 2}
EXPORTED = ("rwkv6", "rwkv7-balanced", "hybrid")
ALONE = {
    **{"train.optimizer": "muon", "train.spike_factor": 3.0, "train.accumulate_grad_batches": 2, "train.micro_bsz": 2},
    **{"train.validation_data_file": "corpus/heldout", "train.heldout_tokens": 64, "train.heldout_every_steps": 2},
}
# The stage, the folder it starts from, and what else is configured. None sets its student up: versions after 5c9f070
# draw other numbers there, and so refuse to go on
RUNS: dict[str, tuple[str, str, dict[str, object]]] = {
    "alone": ("distill", "stages/rwkv7-balanced/1-align", ALONE),
    "ddp": ("align", "stages/rwkv6/1-align", MODELS["rwkv6"] | {"train.strategy": "ddp"}),
    "fsdp": ("align", "stages/rwkv7-groupnorm/1-align", MODELS["rwkv7-groupnorm"] | {"train.strategy": "fsdp"}),
    "zero2": (
        "extend",
        "stages/rwkv7-balanced/2-distill",
        {"train.strategy": "deepspeed_stage_2", "train.trainable": "decay"},
    ),
    "zero3": ("align", "stages/rwkv7-balanced/1-align", {"train.strategy": "deepspeed_stage_3"}),
}
QUESTIONS = ("what was that?", "")


def main(checkout: Path, out: Path) -> None:
    sys.path[:0] = [str(checkout / name) for name in ("src", "tests", "tests/distributed")]
    os.environ["HF_HUB_OFFLINE"] = "1"
    out.mkdir(parents=True)
    os.chdir(out)
    for name in ("corpus", "states", "expected"):
        Path(name).mkdir()
    write_teacher(Path("teacher"))
    write_corpus(Path("corpus/train"), seed=0, num_tokens=1640)
    write_corpus(Path("corpus/heldout"), seed=1, num_tokens=160)
    train([entry for model in MODELS for entry in finished_stages(model)])
    write_unfinished()
    for path in [*Path().rglob("tensorboard"), *Path().rglob(".radlads-unfinished")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for model in EXPORTED:
        write_export(model)
    write_states()
    write_logits()


def write_teacher(folder: Path) -> None:
    """A random Qwen2 in bf16, which hardly ever ends a text, with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    heads, end = {"num_attention_heads": 2, "num_key_value_heads": 1}, {"bos_token_id": END, "eos_token_id": END}
    config = Qwen2Config(vocab_size=VOCAB, **sizes, **heads, **end, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    model.lm_head.weight.data[:END] *= 3
    model.lm_head.weight.data[END] = 0
    model.bfloat16().save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*LETTERS, "<|end|>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def write_corpus(stem: Path, *, seed: int, num_tokens: int) -> None:
    """Random walks over the vocabulary, in documents of 40 tokens."""
    import numpy as np

    from radlads.data.binidx import BinIdxWriter

    steps = np.random.default_rng(seed).integers(-3, 4, num_tokens)
    with BinIdxWriter(stem, VOCAB) as writer:
        for document in np.split(np.cumsum(steps) % END, num_tokens // 40):
            writer.add_document(document)


def keys(stage: str, folder: Path, **own: object) -> dict[str, object]:
    """A stage's configuration: 6 steps of 4 sequences of 16 tokens."""
    ranks = ("tokenshift", "decay", "iclr", "value_residual_mix", "gate")
    learns = {"train.teacher.hf_path": "teacher"} if stage != "extend" else {}
    return {
        "model.ctx_len": 16,
        "model.groupnorm_att": 0,
        "model.gate_rank_type": 2,
        **{f"model.lora_rank_{name}": 2 for name in ranks},
        "train.attention_distillation_stage": {"align": 1, "distill": 2, "extend": -1}[stage],
        "train.data_file": "corpus/train",
        "train.precision": "fp32",
        "train.accelerator": "cpu",
        "train.micro_bsz": 4,
        "train.lr_init": 3e-3,
        "train.my_exit_tokens": TOKENS_PER_STEP * 6,
        "train.log_every_n_steps": 1,
        "train.ds_bucket_mb": 1,
        "train.proj_dir": str(folder.parent),
        "train.proj_name": folder.name,
        **learns,
        **own,
    }


def finished_stages(model: str) -> list[dict]:
    """Entries of stages.py for a model's two stages, whose configurations say the same in two ways where they can."""
    align, distill, own = Path("stages", model, "1-align"), Path("stages", model, "2-distill"), MODELS[model]
    again = own | SPELT_OTHERWISE if model == "hybrid" else own
    later = keys("distill", distill, **again, **{"train.load_model": str(align)})
    return [{"keys": keys("align", align, **own)}, {"keys": later}]


def write_unfinished() -> None:
    """Stop each run, keep what that leaves, go on to the end, and keep what that gives."""
    alone, *others = (unfinished(name) for name in RUNS)
    train([alone | {"stop": [0, 2]}], code=128 + signal.SIGTERM)
    train([each | {"stop": [1, 2], "goes_on": each is not others[-1]} for each in others], code=128 + signal.SIGTERM)
    shutil.copytree("unfinished", "stopped")
    train([alone])
    train(others)
    for name in RUNS:
        write_end(name, Path("unfinished") / name)
    shutil.rmtree("unfinished")
    Path("stopped").rename("unfinished")


def unfinished(name: str) -> dict:
    """The entry of stages.py for a run; of two processes in half as large batches, unless it is the one alone."""
    stage, parent, own = RUNS[name]
    shared = {} if name == "alone" else {"train.devices": 2, "train.micro_bsz": 2}
    own = {"train.load_model": parent, **shared, **own}
    entry = {"keys": keys(stage, Path("unfinished", name), **own)}
    return entry | {"deepspeed_on_cpu": True} if name.startswith("zero") else entry


def train(entries: list[dict], code: int = 0) -> None:
    """Train stages by the commit's own test program."""
    from launch import run

    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), entries, code=code)


def write_end(name: str, folder: Path) -> None:
    """What a run came to: its metrics, some of each weight's numbers, and its logits."""
    from safetensors.torch import save_file

    from radlads.checkpoint.model_folder import load_model

    model = load_model(folder)
    shutil.copyfile(folder / "metrics.csv", f"expected/{name}.csv")
    if (folder / "heldout.csv").is_file():
        shutil.copyfile(folder / "heldout.csv", f"expected/{name}-heldout.csv")
    some = {key: some_of(value) for key, value in model.named_parameters()}
    save_file(some | {"logits": logits(model)}, f"expected/{name}.safetensors")


def some_of(value):
    """Sixteen numbers or a few more, from all over a tensor."""
    return value.detach().flatten()[:: max(1, value.numel() // 16)].clone()


def tokens():
    """Two rows of 9 tokens, [2, 9]."""
    import torch

    return torch.arange(18).view(2, 9) * 7 % END


def logits(model):
    """Of `tokens`, [2, 9, VOCAB] fp32."""
    import torch

    with torch.inference_mode():
        return model(tokens()).logits.clone()


def write_export(model: str) -> None:
    from radlads.cli import main as radlads

    assert radlads(["export", f"stages/{model}/2-distill", f"exports/{model}", "--dtype", "bfloat16"]) == 0
    for path in Path("exports", model).glob("*.py"):
        path.unlink()


def write_states() -> None:
    """State files and what is generated from them. A softmax layer's state grows with its text, so the hybrid's text is
    short, and read in shorter pieces than the 2048 tokens after which there is a state to store."""
    from radlads.cli import main as radlads
    from radlads.inference import saved_state

    said: dict[str, list[str]] = {}
    for model in EXPORTED:
        length, piece = (150, 64) if model == "hybrid" else (2060, saved_state.PREFILL_TOKENS)
        text, state = "".join(LETTERS[i * i % 31] for i in range(length)), f"states/{model}.state"
        saved_state.PREFILL_TOKENS, whole = piece, saved_state.PREFILL_TOKENS
        reading = ["--prompt", text, "--save-state", state, "--max-tokens", "0"]
        assert radlads(["generate", f"exports/{model}", "--device", "cpu", *reading]) == 0
        saved_state.PREFILL_TOKENS = whole
        said[model] = [answer(radlads, model, question) for question in QUESTIONS]
    Path("expected/texts.json").write_text(json.dumps(said, indent=1) + "\n")


def answer(radlads, model: str, question: str) -> str:
    """32 tokens after the stored text and this question, drawn from a seed."""
    options = ["--load-state", f"states/{model}.state", "--prompt", question, "--max-tokens", "32", "--seed", "5"]
    with redirect_stdout(io.StringIO()) as output:
        assert radlads(["generate", f"exports/{model}", "--device", "cpu", *options]) == 0
    return output.getvalue()


def write_logits() -> None:
    from safetensors.torch import save_file

    from radlads.checkpoint.model_folder import load_model

    folders = sorted(path.parent for root in ("stages", "exports") for path in Path(root).rglob("config.json"))
    found = {folder.as_posix(): logits(load_model(folder)) for folder in folders}
    save_file(found | {"tokens": tokens()}, "expected/logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
