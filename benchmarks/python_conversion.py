"""A real conversion from scratch: train a Qwen2 on this machine's Python sources, convert it three ways, and compare.

    python benchmarks/python_conversion.py --out out/python [--device cuda]

Whole packages are held out before anything else. The teacher (76M parameters, about three minutes on one H200) ends
its training at 8192 tokens of context. Every student gets the same tokens: align and distill at 512 tokens of context,
as in the paper, so that what lies beyond is for the last stage to learn; extend at 8192, labels alone. Budgets and
learning rates were chosen before the first run, and nothing is selected by the held-out files.

Writes DIR/results.json (results-2.json beside an earlier run's) after every stage. A finished corpus or teacher in DIR
is kept, a student is not.
"""

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from python_corpus import build_corpus, interpreter_roots
from python_teacher import TeacherPlan, autocast, train_teacher
from torch.utils.data import DataLoader

from radlads.checkpoint.manifest import versions
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.convert.hf_source import TeacherSource, open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.data.binidx import BinIdxReader
from radlads.distill.heldout import measure
from radlads.evaluation.perplexity import loss_by_position, spread_windows
from radlads.files import write_text
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.fit import run_stage

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STUDENTS = {"rad_rwkv7": "rad_rwkv7.yaml", "rad_rwkv7_group_norm": "qwerky7.yaml", "rad_rwkv6": "rad_rwkv6.yaml"}
STAGES = {"align": "paper_distill1.yaml", "distill": "paper_distill2.yaml", "extend": "paper_distill3.yaml"}
_PROGRESS_EVERY_S = 5


def knob(default: Any, text: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run, chosen for 8.5 minutes on one H200 with 16 CPU cores."""

    vocab_size: int = knob(16384, "Entries of the tokenizer")
    tokenizer_bytes: int = knob(60_000_000, "Text that the tokenizer is trained on")
    hidden_size: int = knob(640, "Channels of the models")
    intermediate_size: int = knob(1760, "Channels inside the channel mixers")
    num_layers: int = knob(12, "Layers of the models")
    head_size: int = knob(64, "Channels of a head")
    teacher_seconds: float = knob(165.0, "Time for the teacher's training, compiling included")
    teacher_tokens: int = knob(0, "The teacher's token budget; 0 = by time")
    teacher_context: int = knob(2048, "Tokens in a sequence for the first 80 % of the teacher's training")
    teacher_batch_tokens: int = knob(131_072, "Tokens in a step of the teacher's")
    teacher_lr: float = knob(2e-3, "The teacher's learning rate (Muon, AdamW)")
    align_tokens: int = knob(2_000_000, "Budget of stage 1")
    distill_tokens: int = knob(3_000_000, "Budget of stage 2")
    extend_tokens: int = knob(1_000_000, "Budget of stage 3")
    align_lr: float = knob(1e-3, "Learning rate of stage 1, the paper's; falls to 1 % of it")
    distill_lr: float = knob(
        3e-4, "Learning rate of stage 2; falls to a tenth. The paper's 1e-5 is for models of billions of parameters"
    )
    extend_lr: float = knob(1e-4, "Learning rate of stage 3; falls to a tenth")
    context: int = knob(512, "Tokens in a sequence of stages 1 and 2")
    batch_tokens: int = knob(8192, "Tokens in a step of stages 1 and 2: small, because the steps are few")
    long_context: int = knob(
        8192, "Tokens in a sequence of stage 3, of the end of the teacher's training, and of the losses by position"
    )
    long_batch_tokens: int = knob(16_384, "Tokens in a step of stage 3")
    measure_tokens: int = knob(131_072, "Held-out tokens for loss, KL and agreement, in windows of --context")
    position_tokens: int = knob(262_144, "Held-out tokens for the losses by position")
    seed: int = knob(1337, "Seed of the teacher and of every student")

    def __post_init__(self) -> None:
        if self.long_context <= 4 * self.context:
            raise ValueError(f"--long-context must be more than 4 times --context, so above {4 * self.context}")

    @property
    def edges(self) -> tuple[int, ...]:
        """Bins of the losses by position: the short context, up to four times that, and all beyond."""
        return (0, self.context, 4 * self.context, self.long_context)

    def teacher(self, *, compile_layers: bool) -> TeacherPlan:
        """The teacher's part."""
        return TeacherPlan(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            head_size=self.head_size,
            context=self.teacher_context,
            long_context=self.long_context,
            long_share=0.2,
            batch_tokens=self.teacher_batch_tokens,
            seconds=self.teacher_seconds,
            tokens=self.teacher_tokens,
            lr=self.teacher_lr,
            seed=self.seed,
            compile=compile_layers,
        )


TINY = Plan(
    vocab_size=320,
    tokenizer_bytes=200_000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    head_size=16,
    teacher_tokens=40_960,
    teacher_context=64,
    teacher_batch_tokens=1024,
    align_tokens=2048,
    distill_tokens=2048,
    extend_tokens=1024,
    context=32,
    batch_tokens=256,
    long_context=256,
    long_batch_tokens=256,
    measure_tokens=1024,
    position_tokens=1024,
)


class Results:
    """results.json, written anew whenever something is added."""

    def __init__(self, path: Path, began: float, **facts: object) -> None:
        self._path, self._began, self.content = path, began, dict(facts)

    def add(self, *keys: str, value: object) -> None:
        """Put `value` at a path of keys."""
        place: dict[str, Any] = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
        self.content["seconds"] = round(time.monotonic() - self._began, 1)
        write_text(self._path, json.dumps(self.content, indent=2) + "\n")


class TimedConsole:
    """Prints every line with the seconds since the start, and progress every few seconds."""

    def __init__(self, began: float) -> None:
        self._began, self._shown = began, 0.0

    def line(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f}s  {text}", flush=True)

    def progress(self, text: str) -> None:
        if time.monotonic() - self._shown >= _PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            self.line(text)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same for a whole run. overrides: dotted configuration keys for all students' stages."""

    plan: Plan
    out: Path
    device: str
    overrides: dict[str, str]
    console: TimedConsole
    results: Results


def compare(run: Run, *, roots: Iterable[Path], students: Sequence[str], workers: int, compile_teacher: bool) -> bool:
    """Build the corpus, train the teacher, convert it; True if every student is there in the end.

    A student that fails is recorded with its error, and the next one has its turn.
    """
    plan, console = run.plan, run.console
    data = build_corpus(
        run.out / "data",
        roots,
        vocab_size=plan.vocab_size,
        sample_bytes=plan.tokenizer_bytes,
        workers=workers,
        tell=console.line,
    )
    run.results.add("data", value=data)
    facts = train_teacher(
        plan.teacher(compile_layers=compile_teacher),
        BinIdxReader(run.out / "data" / "train"),
        run.out / "data" / "tokenizer.json",
        run.out / "teacher",
        run.device,
        console.line,
    )
    run.results.add("teacher", value=facts)
    source = open_teacher(run.out / "teacher")
    teacher = build_teacher(source)
    record(run, teacher, teacher, "teacher", **facts)
    failed = [name for name in students if not converted(run, name, source, teacher)]
    for row in table(run.results.content):
        console.line(row)
    return not failed


def converted(run: Run, name: str, source: TeacherSource, teacher: RadladsForCausalLM) -> bool:
    """Convert into one student; False, and the error among the results, if that fails."""
    try:
        convert(run, name, source, teacher)
    except (RuntimeError, ValueError) as error:
        traceback.print_exc()
        run.results.add("students", name, "error", value=f"{type(error).__name__}: {error}")
        return False
    return True


def convert(run: Run, name: str, source: TeacherSource, teacher: RadladsForCausalLM) -> None:
    """Set a student up, train it through the three stages, and measure it after each."""
    configs = {stage: stage_config(run, name, stage) for stage in STAGES}
    torch.manual_seed(run.plan.seed)
    student, _ = build_student(source, configs["align"].model)
    record(run, student, teacher, "students", name, "setup")
    parent = f"setup of {source.folder.name}"
    for number, (stage, config) in enumerate(configs.items(), start=1):
        folder = run.out / name / f"{number}-{stage}"
        taught = None if stage == "extend" else teacher
        result = run_stage(config, student, taught, folder, run.console, parent=parent)
        speed = result.tokens / result.seconds
        facts = {"tokens": result.tokens, "training_s": result.seconds, "tokens_per_s": speed}
        record(run, student, teacher, "students", name, stage, **facts)
        parent = f"{name}/{folder.name}"


def stage_config(run: Run, name: str, stage: str) -> Config:
    """A stage of a student: the paper's files, then the plan's budget, rates and shapes, then the run's overrides."""
    plan, on_gpu = run.plan, run.device == "cuda"
    context, batch_tokens = plan.context, plan.batch_tokens
    if stage == "extend":
        context, batch_tokens = plan.long_context, plan.long_batch_tokens
    tokens = {"align": plan.align_tokens, "distill": plan.distill_tokens, "extend": plan.extend_tokens}[stage]
    first = {"align": plan.align_lr, "distill": plan.distill_lr, "extend": plan.extend_lr}[stage]
    keys: dict[str, object] = {
        "model.ctx_len": context,
        "train.my_exit_tokens": tokens,
        "train.micro_bsz": max(1, batch_tokens // context),
        "train.accumulate_grad_batches": 1,
        "train.grad_cp": 0,
        "train.lr_init": first,
        "train.lr_final": first / (100 if stage == "align" else 10),
        "train.warmup_steps": tokens // batch_tokens // 20,
        "train.log_every_n_steps": 10,
        "train.seed_everything": plan.seed,
        "train.data_file": str(run.out / "data" / "train"),
        "train.proj_dir": str(run.out / name),
        "train.teacher.hf_path": "" if stage == "extend" else str(run.out / "teacher"),
        "train.accelerator": "gpu" if on_gpu else "cpu",
        "train.precision": "bf16" if on_gpu else "fp32",
    }
    return load_config([CONFIGS / STUDENTS[name], CONFIGS / STAGES[stage]], keys | run.overrides)


def record(run: Run, model: RadladsForCausalLM, teacher: RadladsForCausalLM, *keys: str, **facts: object) -> None:
    """Measure a model on the held-out text and put that among the results, beside the facts given."""
    began = time.monotonic()
    plan, heldout = run.plan, BinIdxReader(run.out / "data" / "heldout")
    windows = spread_windows(heldout, plan.context, plan.measure_tokens)
    batches = DataLoader(windows, batch_size=max(1, plan.batch_tokens // plan.context))
    for each in (model, teacher):
        each.to(run.device)
    with autocast(run.device):
        means = measure(model, teacher, batches)
        bins = loss_by_position(
            model,
            heldout,
            context_tokens=plan.long_context,
            edges=plan.edges,
            max_tokens=plan.position_tokens,
            batch_windows=max(1, plan.long_batch_tokens // plan.long_context),
        )
    measured = {"heldout": asdict(means), "by_position": [asdict(each) for each in bins]}
    run.results.add(*keys, value={**facts, **measured, "measuring_s": time.monotonic() - began})
    positions = ", ".join(f"{each.first}-{each.end} {each.loss:.4f}" for each in bins)
    run.console.line(
        f"{' '.join(keys):36} held-out loss {means.loss:.4f}, KL {means.kl:.4f}, top-1 {means.top1:.4f}; by position "
        f"{positions}"
    )


def table(content: dict[str, Any]) -> Iterator[str]:
    """Rows of all measurements so far: loss, KL and agreement at the short context, losses by position at the long."""
    measurements = {"teacher": content["teacher"]}
    for name, stages in content.get("students", {}).items():
        measurements |= {f"{name} {stage}": facts for stage, facts in stages.items() if stage != "error"}
    bins = content["teacher"]["by_position"]
    yield f"{'':32}{'loss':>8}{'KL':>8}{'top-1':>8}" + "".join(f"{x['first']}-{x['end']}".rjust(11) for x in bins)
    for name, facts in measurements.items():
        heldout, losses = facts["heldout"], [each["loss"] for each in facts["by_position"]]
        means = "".join(f"{heldout[key]:8.4f}" for key in ("loss", "kl", "top1"))
        yield f"{name:32}{means}" + "".join(f"{loss:11.4f}" for loss in losses)


def device_name(device: str) -> str:
    """What the run runs on, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `plan` is the default or TINY, with the numbers given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--results", type=Path, help="file for the results (default: results.json in --out)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="start from numbers for a CPU and less than a minute")
    parser.add_argument(
        "--text", type=Path, action="append", help="folder of .py files to use instead of this Python's; repeatable"
    )
    parser.add_argument("--only", choices=list(STUDENTS), action="append", help="a student; repeatable (default: all)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a configuration key, all stages"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read and tokenise")
    parser.add_argument("--eager", action="store_true", help="do not compile the teacher's layers for its training")
    for each in fields(Plan):
        text = f"{each.metadata['help']} (default: {each.default})".replace("%", "%%")
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=each.type, help=text)
    arguments = parser.parse_args(argv)
    given = {each.name: getattr(arguments, each.name) for each in fields(Plan)}
    given = {name: value for name, value in given.items() if value is not None}
    if wrong := [pair for pair in arguments.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]} must be KEY=VALUE")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here: choose --device cpu, and --tiny with it")
    arguments.only = arguments.only or list(STUDENTS)
    if held := [name for name in arguments.only if (arguments.out / name).exists()]:
        parser.error(f"{arguments.out / held[0]} exists already: remove it, or choose another --out or --only")
    try:
        arguments.plan = replace(TINY if arguments.tiny else Plan(), **given)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def results_file(out: Path) -> Path:
    """results.json, or the first results-N.json that an earlier run left free."""
    names = (f"results-{number}.json" if number > 1 else "results.json" for number in itertools.count(1))
    return next(out / name for name in names if not (out / name).exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if every student is there in the end."""
    arguments = parse(argv)
    out, device, began = arguments.out, arguments.device, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    facts = {"plan": asdict(arguments.plan), "overrides": arguments.set, "versions": versions()}
    run = Run(
        plan=arguments.plan,
        out=out,
        device=device,
        overrides=dict(pair.split("=", 1) for pair in arguments.set),
        console=TimedConsole(began),
        results=Results(arguments.results or results_file(out), began, device=device_name(device), **facts),
    )
    complete = compare(
        run,
        roots=arguments.text or interpreter_roots(),
        students=arguments.only,
        workers=arguments.workers,
        compile_teacher=device == "cuda" and not arguments.eager,
    )
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
