"""`radlads demo`, `export` and `verify`: their options, and the conversion or export that these ask for.

Imports no torch before it has to.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radlads.config.schema import ModelConfig
from radlads.report.wording import HELDOUT_ROWS, gap_start, heldout_title

if TYPE_CHECKING:
    from radlads.recipes.export import Export
    from radlads.recipes.stage_configs import Conversion


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads demo`."""
    parser.add_argument(
        "--teacher",
        help="a Hugging Face folder, a hub name such as Qwen/Qwen2.5-0.5B-Instruct, a GGUF file, or smollm2 (fetched)",
    )
    add_mixer_options(parser, default_variant="the mixer's first, the paper's")
    parser.add_argument(
        "--recipe",
        help="window: softmax over the last 192 tokens (smollm2: 64) beside the recurrence, which keeps more of the "
        "teacher (the default for our mixers); paper: as published",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="then convert twice more at equal tokens, into OUT/compare: as published, and with one softmax layer kept",
    )
    parser.add_argument("--out", type=Path, help="folder to write (default out/demo, out/conversion with --teacher)")
    parser.add_argument("--data", type=Path, help="training tokens, a .bin/.idx pair (default: this Python's own text)")
    parser.add_argument("--heldout-data", type=Path, help="held-out tokens, a .bin/.idx pair; goes with --data")
    _add_set_option(parser, "a configuration key of all stages, e.g. train.micro_bsz=4")
    parser.add_argument(
        "--instruct",
        action="store_true",
        help="end with stage 4, on conversations that the teacher writes (an instruct teacher, such as smollm2)",
    )
    parser.add_argument(
        "--chat", type=Path, help="with --instruct: conversations to learn from, by `radlads data build --chat`"
    )
    parser.add_argument(
        "--retie", action="store_true", help="end with the embedding as the head again (teachers whose head is tied)"
    )


def add_mixer_options(parser: argparse.ArgumentParser, *, default_variant: str) -> None:
    """The options that choose a student's mixer."""
    parser.add_argument(
        "--mixer", default=ModelConfig.tmix, help=f"time mixer, ours or your own (default {ModelConfig.tmix})"
    )
    parser.add_argument("--variant", help=f"of the mixer, if it has any (default: {default_variant})")


def add_model_options(parser: argparse.ArgumentParser, *, default_variant: str) -> None:
    """The options that choose a student: its mixer and keys of the model section."""
    add_mixer_options(parser, default_variant=default_variant)
    _add_set_option(parser, "a configuration key of the model section, e.g. model.preserve_last_n_layers=4")


def _add_set_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads export`."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a conversion's folder, a stage's, or a model's")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder to write; without it RUN is uploaded")
    parser.add_argument("--teacher", metavar="DIR", help="whose tokenizer the model gets, where RUN does not say")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: RUN's)")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights, such as 5GB (default) or 500MB")
    parser.add_argument(
        "--check", choices=["gguf", "vllm"], help="write nothing; say whether llama.cpp or vLLM can run the model"
    )
    parser.add_argument("--for-llama-cpp", action="store_true", help="write what llama.cpp's converter reads")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make the repository a private one, if it is new")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded instead")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """The options of `radlads verify`."""
    what = "a conversion's folder, a stage's, a checkpoint's or an export's, or a corpus by its .bin file"
    parser.add_argument("path", type=Path, metavar="DIR_OR_CORPUS", help=what)


def overrides_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The configuration keys that --set names. Raises ValueError for what is no KEY=VALUE."""
    return dict(_override(text) for text in arguments.set)


def conversion_of(arguments: argparse.Namespace) -> "Conversion":
    """The conversion that add_demo_options' arguments describe. Raises ValueError for values that make none."""
    from radlads.recipes.stage_configs import BUNDLED_TEACHER, Conversion

    return Conversion(
        teacher=arguments.teacher or BUNDLED_TEACHER,
        mixer=arguments.mixer,
        variant=arguments.variant,
        recipe=arguments.recipe,
        out=arguments.out or Path("out") / ("demo" if arguments.teacher is None else "conversion"),
        data=arguments.data,
        heldout_data=arguments.heldout_data,
        overrides=overrides_of(arguments),
        retie=arguments.retie,
        instruct=arguments.instruct,
        chat=arguments.chat,
    )


def export_of(arguments: argparse.Namespace) -> "Export":
    """The export that add_export_options' arguments describe. Raises ValueError for values that make none."""
    from radlads.recipes.export import Export

    return Export(
        run=arguments.run_folder,
        out=arguments.out,
        teacher=arguments.teacher,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        for_llama_cpp=arguments.for_llama_cpp,
        repo=arguments.push_to_hub,
        private=arguments.private,
        dry_run=arguments.dry_run,
    )


def check_lines(arguments: argparse.Namespace) -> tuple[bool, list[str]]:
    """For --check: whether llama.cpp or vLLM can run it, and why. Raises ValueError beside options that write."""
    from radlads.recipes.export import check_gguf, check_vllm

    if arguments.out is not None or arguments.push_to_hub is not None:
        raise ValueError("--check writes nothing: leave out OUT and --push-to-hub, or --check")
    check = {"gguf": check_gguf, "vllm": check_vllm}[arguments.check]
    return check(arguments.run_folder, arguments.teacher)


def summary_lines(summary: Mapping[str, Any], out: Path) -> Iterator[str]:
    """What a conversion came to, as its summary.json has it."""
    yield f"\n{'held out':24}{'loss':>9}{'KL':>9}{'top-1':>8}{'tokens':>12}{'seconds':>9}"
    for row in HELDOUT_ROWS:
        if row not in summary:
            continue
        values = summary[row]
        cost = f"{values['tokens']:12,}{values['seconds']:9.0f}" if "tokens" in values else ""
        yield f"{heldout_title(row, values):24}{values['loss']:9.4f}{values['kl']:9.4f}{values['top1']:8.1%}{cost}"
    yield f"\n{summary['gap_closed']:.1%} of the gap between {gap_start(summary)} and teacher is closed"
    positions = ", ".join(summary["decode_ms"]["student"])
    yield f"\n{'':12}{'state in kB at 1k, 8k, 64k tokens':>36}{f'ms per token at position {positions}':>40}"
    for name in ("teacher", "student"):
        state = " ".join(f"{value / 1000:10,.0f}" for value in summary["bytes"][name].values())
        decode = " ".join(f"{value:8.2f}" for value in summary["decode_ms"][name].values())
        yield f"{name:12}{state:>36}{decode:>40}"
    for name in ("teacher", "student"):
        yield f"\n--- the {name} continues {summary['sample']['prompt']!r}\n{summary['sample'][name]}"
    yield f"\nexport reloads without radlads: logits differ by at most {summary['reload_max_abs_diff']:.1e}"
    yield f"{summary['seconds']:.0f} s, at most {summary['peak_rss_gb']:.1f} GB"
    yield f"model: {out}/hf, report: {out}/report.html"


def _override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, not {text!r}")
    return key, value
