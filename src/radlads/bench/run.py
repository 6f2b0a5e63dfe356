"""A whole benchmark as the command runs it: device, shape, ceilings, cases, record."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from radlads.bench.cases import Kind, decode_case, kernel_case, prefill_case, read_cases, select_cases, train_case
from radlads.bench.inference import bench_decode, bench_prefill
from radlads.bench.kernels import bench_kernels, select_backends
from radlads.bench.measure import device_name, measure_ceilings
from radlads.bench.record import Record, checkout_commit, environment
from radlads.bench.train import TrainSettings, bench_train
from radlads.console import Console
from radlads.convert.shapes import MEASURED_VARIANT, measured_variant, open_shape
from radlads.inference.generate import choose_device
from radlads.model.registry import DEFAULT, registered_name

RESULTS_SHAPE = "7b"
_WINDOW, _SINKS = "model.mixer.window_tokens", "model.mixer.sink_tokens"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to measure. shape: "7b", "tiny", a Hugging Face folder, or None for 7b on CUDA and tiny elsewhere.

    layers: instead of the shape's. variant: as measured_variant has it. overrides: keys of the model section.
    cases: comma-separated names or "all". compiled: torch.compile; None = on CUDA.
    checkpointing, teacher_precision: of training steps, as TrainSettings has them. backends: of kernels, None = all.
    teacher: measure it beside the student (prefill and decode). json: the full record. results: the file of latest
    results to bring up to date. commit: to record where the code lies in no checkout.
    """

    kind: Kind
    shape: str | None = None
    layers: int | None = None
    mixer: str = DEFAULT
    variant: str | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)
    device: str = "auto"
    cases: str = "all"
    checkpointing: str = "auto"
    teacher_precision: str = "same"
    compiled: bool | None = None
    backends: str | None = None
    teacher: bool = True
    json: Path | None = None
    results: Path | None = None
    commit: str | None = None
    command: str = ""


def run_bench(bench: Bench, console: Console) -> int:
    """Measure, and return the number of cases that failed. Rows go to the console as soon as they are there.

    Raises ValueError for a device that is not there, an unknown shape or case, or results that would not be comparable.
    """
    device, dtype = choose_device(bench.device)
    shape_name = bench.shape or ("7b" if device.type == "cuda" else "tiny")
    variant = measured_variant(bench.mixer, bench.variant)
    shape = open_shape(shape_name, mixer=bench.mixer, variant=variant, layers=bench.layers, overrides=bench.overrides)
    names = select_cases(bench.kind, bench.cases, tiny=shape_name == "tiny")
    suffix = _prepare_outputs(bench, device.type, shape_name)
    record = Record(
        console=console,
        facts={
            **{"command": bench.command, **environment(device_name(device))},
            **{"shape": {"name": shape_name, **shape.sizes()}, "mixer": bench.mixer, "variant": variant},
            "dtype": str(dtype).removeprefix("torch."),
        },
        commit=bench.commit or checkout_commit(),
        json_path=bench.json,
        results_path=bench.results,
        results_suffix=suffix,
    )
    compiled = device.type == "cuda" if bench.compiled is None else bench.compiled
    match bench.kind:
        case "train":
            train_cases = read_cases(train_case, names)
            ceilings = record.open(measure_ceilings(device))
            settings = TrainSettings(
                checkpointing=bench.checkpointing, teacher_precision=bench.teacher_precision, compiled=compiled
            )
            bench_train(train_cases, shape, settings, device, dtype, ceilings, record)
        case "prefill":
            prefill_cases = read_cases(prefill_case, names)
            ceilings = record.open(measure_ceilings(device))
            bench_prefill(
                prefill_cases, shape, device, dtype, ceilings, record, teacher=bench.teacher, compiled=compiled
            )
        case "decode":
            decode_cases = read_cases(decode_case, names)
            ceilings = record.open(measure_ceilings(device))
            bench_decode(decode_cases, shape, device, dtype, ceilings, record, teacher=bench.teacher)
        case "kernels":
            kernel_cases = read_cases(kernel_case, names)
            ceilings = record.open(measure_ceilings(device))
            bench_kernels(kernel_cases, select_backends(bench.backends), device, dtype, ceilings, record)
    record.say("done" if not record.num_failed else f"{record.num_failed} of the cases failed")
    return record.num_failed


def _prepare_outputs(bench: Bench, device_type: str, shape_name: str) -> str:
    """Make the folders to write to, and return what the results' names end with.

    Raises ValueError for results that would not be comparable.
    """
    model = registered_name(bench.mixer), measured_variant(bench.mixer, bench.variant)
    usual = model == (DEFAULT, MEASURED_VARIANT) and bench.layers is None and set(bench.overrides) <= {_WINDOW, _SINKS}
    if bench.results is not None and not (usual and device_type == "cuda" and shape_name == RESULTS_SHAPE):
        raise ValueError(
            f"--results holds measurements on CUDA of the shape {RESULTS_SHAPE} with {DEFAULT}, {MEASURED_VARIANT}, "
            f"and of its keys only {_WINDOW} and {_SINKS} may be set: leave --results out, or use --json"
        )
    for path in (bench.json, bench.results):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    window = bench.overrides.get(_WINDOW, 0)
    return "" if str(window) == "0" else f"_window{window}"
