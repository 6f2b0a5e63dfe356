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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from conversion_runs import TimedConsole, add_knobs, budget, device_name, stage_keys, with_knobs
from pretraining import autocast
from python_corpus import build_corpus, interpreter_roots
from python_plan import TINY, Plan
from python_teacher import train_teacher
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
    given = budget(run.plan, stage)
    keys = stage_keys(
        given,
        seed=run.plan.seed,
        data=str(run.out / "data" / "train"),
        folder=run.out / name,
        teacher=None if stage == "extend" else run.out / "teacher",
        device=run.device,
    )
    keys |= {
        "train.accumulate_grad_batches": 1,
        "train.grad_cp": 0,
        "train.lr_final": given.lr / (100 if stage == "align" else 10),
        "train.warmup_steps": given.tokens // given.batch_tokens // 20,
        "train.log_every_n_steps": 10,
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
    add_knobs(parser, Plan, default="default: {}")
    arguments = parser.parse_args(argv)
    if wrong := [pair for pair in arguments.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]} must be KEY=VALUE")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here: choose --device cpu, and --tiny with it")
    arguments.only = arguments.only or list(STUDENTS)
    if held := [name for name in arguments.only if (arguments.out / name).exists()]:
        parser.error(f"{arguments.out / held[0]} exists already: remove it, or choose another --out or --only")
    try:
        arguments.plan = with_knobs(TINY if arguments.tiny else Plan(), arguments)
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
