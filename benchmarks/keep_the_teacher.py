"""How much of the teacher is kept by a window, by softmax in a few layers, and by both, after how many tokens.

    python benchmarks/keep_the_teacher.py --out out/keep --jobs 12                    # on one GPU, teacher included
    python benchmarks/keep_the_teacher.py --out out/keep --teacher smollm2 --data data/real --jobs 4

The Python teacher (31M parameters, 2.5 minutes on one H200) is trained first, on this machine's Python sources, and
kept in DIR; whole packages are held out. Any other --teacher is converted on the text of benchmarks/real_text.py. Every
student is RAD-RWKV7 and gets the same text in the same order through align and distill; rows differ in how much of it,
and in what stands beside the recurrence:

    paper               the paper's recipe, all of the tokens
    window              a softmax window with sinks in every layer, all of the tokens; window_third: a third
    kept_third          one layer in eight is the teacher's, selected after align as `radlads select` does; a third
    window_kept_third   both; window_kept_tenth: after a tenth of the tokens
    teacher, teacher_window_untrained, window_untrained     the teacher, its attention cut to the window, setup

A row may be changed: 'window_third:sink_tokens=16', 'window_third:distill_lr=1e-4,mixer_lr=1e-4',
'window_kept_third:layers=every:8', 'paper:train.optimizer=muon'. Each trained student is also measured without its
window, without its recurrence, and with the aligned mixers in the place of the layers kept.

--jobs N measures so many students at a time, a process each, on the one device; DIR/TEACHER/ROW-seed-N has its log and
its models. One that fails is told of, and the others go on. DIR/keep_the_teacher.json has every row that is finished:
{teacher: {row: ...}}. The same command goes on where it stopped. --tiny does the same in small on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conversion_runs import TimedConsole, add_knobs, device_name, with_knobs
from keep_plan import TINY, Plan, Row, parse_row, usual_rows
from keep_results import RESULTS, table, write_row
from keep_rows import Work, is_measured, result_of, run_row
from python_corpus import build_corpus, interpreter_roots
from python_teacher import train_teacher
from real_measures import KINDS
from real_text import SOURCES, write_tiny_text

from radlads.checkpoint.manifest import versions
from radlads.convert.hf_source import open_teacher
from radlads.data.binidx import BinIdxReader
from radlads.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "python"
OTHER_TEACHER = {"align_tokens": 6_000_000, "distill_tokens": 12_000_000}
"""Full budgets for a teacher that others trained, on one GPU in one sitting; the paper's are a hundred times that."""
_LOG = "log.txt"
END_S = 30  # a student's process that is to end has so long for its step and its checkpoint


class Job(NamedTuple):
    """One student."""

    row: Row
    seed: int


def prepare(arguments: argparse.Namespace, console: TimedConsole) -> Work:
    """Make or find text and teacher. Raises ValueError for a folder that a run of another plan has used."""
    plan, out, name = arguments.plan, arguments.out, teacher_name(arguments)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    check_plan(folder / "plan.json", {"plan": asdict(plan), "set": arguments.set})
    teacher: str | Path = arguments.teacher
    if arguments.teacher == PYTHON:
        teacher, data = folder / "teacher", folder / "data"
        build_corpus(
            data,
            arguments.text or interpreter_roots(),
            vocab_size=plan.vocab_size,
            sample_bytes=plan.tokenizer_bytes,
            workers=arguments.workers,
            tell=console.line,
        )
        train_teacher(
            plan.teacher(compile_layers=arguments.device == "cuda" and not arguments.eager),
            BinIdxReader(data / "train"),
            data / "tokenizer.json",
            teacher,
            arguments.device,
            console.line,
        )
        corpora = {PYTHON: (data / "train", data / "heldout")}
    else:
        data = arguments.data
        if data is None:
            teacher, data = write_tiny_text(out / "text")
        corpora = {kind: (data / f"{kind}-train", data / f"{kind}-heldout") for kind in KINDS}
    if arguments.device == "cuda":
        torch.cuda.empty_cache()  # the rows' processes need it more
    return Work(
        plan=plan,
        folder=folder,
        corpora=corpora,
        source=open_teacher(teacher),
        device=arguments.device,
        overrides=dict(pair.split("=", 1) for pair in arguments.set),
        console=console,
        run={
            "command": " ".join(["python", "benchmarks/keep_the_teacher.py", *arguments.argv]),
            "commit": arguments.commit,
            "date": time.strftime("%Y-%m-%d"),
            "device": device_name(arguments.device),
            "versions": versions(),
            "plan": asdict(plan),
        },
    )


def teacher_name(arguments: argparse.Namespace) -> str:
    """What the results call the teacher."""
    return Path(arguments.teacher).name


def check_plan(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the numbers of a run into its folder. Raises ValueError if other ones are there."""
    if not path.is_file():
        write_text(path, json.dumps(facts, indent=1) + "\n")
    elif read_json(path) != json.loads(json.dumps(facts)):
        raise ValueError(f"{path} is of a run with other numbers: remove its folder, or choose another --out")


def run_jobs(work: Work, jobs: Sequence[Job], arguments: argparse.Namespace) -> list[Job]:
    """Measure every student, several at a time, and write each row as it is finished; those that failed."""
    if not arguments.jobs:
        return [job for job in jobs if not _alone(work, job, arguments)]
    # Else the students' processes would outlive this one; so they write a checkpoint and end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    waiting, running, failed = list(jobs), dict[Job, subprocess.Popen[bytes]](), list[Job]()
    began = {}
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                job = waiting.pop(0)
                running[job], began[job] = _started(work, job, arguments), time.monotonic()
            time.sleep(0.2)
            for job, code in [(job, process.poll()) for job, process in running.items()]:
                if code is None:
                    continue
                del running[job]
                if code:
                    failed.append(job)
                    _tell_failure(work, job, code)
                else:
                    write_results(work, job.row, arguments)
                    seconds = time.monotonic() - began[job]
                    work.console.line(f"{job.row.name}, seed {job.seed}: done in {seconds:.0f} s")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed


def _alone(work: Work, job: Job, arguments: argparse.Namespace) -> bool:
    """Measure a student in this process; False if that fails."""
    try:
        run_row(work, *job)
    except (RuntimeError, ValueError):
        traceback.print_exc()
        return False
    write_results(work, job.row, arguments)
    return True


def _started(work: Work, job: Job, arguments: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """A process that measures a student, with its share of the cores, and what it prints in its log."""
    folder = work.row_folder(*job)
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    command = [sys.executable, __file__, *arguments.argv, "--one", job.row.name, str(job.seed)]
    with (folder / _LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _tell_failure(work: Work, job: Job, code: int) -> None:
    log = work.row_folder(*job) / _LOG
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    work.console.line(f"{job.row.name}, seed {job.seed}: FAILED with {code}: {last} (all of it: {log})")


def write_results(work: Work, row: Row, arguments: argparse.Namespace) -> None:
    """Put a row's seeds that are finished among the results."""
    first = work.plan.seed
    seeds = [seed for seed in range(first, first + arguments.seeds) if is_measured(work, row, seed)]
    found = {seed: result_of(work, row, seed) for seed in seeds}
    if found:
        write_row(arguments.out / RESULTS, teacher_name(arguments), row.name, row.share, found)


def commit() -> str:
    """The checkout's commit; empty outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `plan` has the numbers, `rows` the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything")
    parser.add_argument("--teacher", default=PYTHON, help="python (default), or a folder, GGUF file or name: smollm2")
    parser.add_argument("--data", type=Path, help="folder that real_text.py wrote, for a teacher other than python")
    parser.add_argument("--text", type=Path, action="append", help="folder of .py files for python; repeatable")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="(default: all, in their usual form)")
    parser.add_argument("--seeds", type=int, default=2, help="students of each trained row (default 2)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1); 0 = in this process")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a configuration key, all rows")
    parser.add_argument("--eager", action="store_true", help="do not compile the Python teacher for its training")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read and tokenise")
    parser.add_argument("--commit", default=commit(), help="what the results name (default: the checkout's)")
    parser.add_argument("--tiny", action="store_true", help="start from numbers for a CPU and a minute")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help="measure this one alone, in this process")
    add_knobs(parser, Plan, default="default {}, other teachers' budgets differ")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here: choose --device cpu, and --tiny with it")
    if arguments.seeds < 1 or arguments.jobs < 0:
        parser.error("--seeds must be 1 or more, and --jobs 0 or more")
    if wrong := [pair for pair in arguments.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]} must be KEY=VALUE")
    if (
        arguments.teacher != PYTHON
        and not arguments.tiny
        and not (arguments.data and arguments.data / SOURCES).is_file()
    ):
        parser.error(f"--data must name a folder with {SOURCES}: write the text with benchmarks/real_text.py first")
    plan = TINY if arguments.tiny else Plan()
    if arguments.teacher != PYTHON and not arguments.tiny:
        plan = replace(plan, **OTHER_TEACHER)
    arguments.plan, arguments.argv = with_knobs(plan, arguments), list(argv[:-3] if arguments.one else argv)
    names = [arguments.one[0]] if arguments.one else arguments.rows or list(usual_rows(arguments.plan))
    try:
        arguments.rows = [parse_row(name, arguments.plan) for name in names]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet and print the table; 1 if a student failed."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    console = TimedConsole(time.monotonic())
    try:
        work = prepare(arguments, console)
        if arguments.one:
            run_row(work, arguments.rows[0], int(arguments.one[1]))
            return 0
    except ValueError as error:
        print(f"keep_the_teacher: {error}", file=sys.stderr)
        return 2
    first = work.plan.seed
    students = [Job(row, seed) for row in arguments.rows for seed in range(first, first + arguments.seeds)]
    jobs = [job for job in students if (job.row.share or job.seed == first) and not is_measured(work, *job)]
    failed = run_jobs(work, jobs, arguments)
    for row in arguments.rows:
        write_results(work, row, arguments)
    path = arguments.out / RESULTS
    for line in table(read_json(path).get(teacher_name(arguments), {}) if path.is_file() else {}):
        print(line)
    for job in failed:
        print(f"failed: {job.row.name}, seed {job.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
