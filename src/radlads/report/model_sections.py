"""The page's sections on using the model: samples, how to load it, configurations and versions."""

import shlex

from radlads.report import html
from radlads.report.run_facts import MODELS, run_versions
from radlads.report.run_folder import Run
from radlads.report.wording import NOT_MEASURED, NOT_RECORDED, number_text


def samples(run: Run) -> str:
    """What teacher and student make of the same prompt."""
    sample = (run.summary or {}).get("sample")
    if not sample:
        return html.missing()
    texts = [html.heading(f"The {name}") + html.code(sample.get(name, NOT_MEASURED)) for name in MODELS]
    return html.paragraph("Both continue the same prompt, drawing with the same seed:") + (
        html.code(sample["prompt"]) + html.columns(*texts)
    )


def loading(run: Run) -> str:
    """The lines of code that load the model."""
    if run.export is None:
        folder = run.stages[-1].folder
        lines = "from pathlib import Path\n\nfrom radlads.checkpoint.model_folder import load_model\n\n"
        return html.paragraph("There is no export in this run; a stage's folder loads with radlads:") + html.code(
            f"{lines}model = load_model(Path({str(folder)!r}))"
        )
    name = str(run.export)
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)"
    )
    parts = [html.paragraph("With transformers alone, or on the command line:"), html.code(lines)]
    parts.append(html.code(f"radlads generate {shlex.quote(name)} --prompt 'Once upon a time'"))
    difference = number_text((run.summary or {}).get("reload_max_abs_diff"), ".1e")
    text = "Largest difference of its logits from the student's, reloaded in a process without radlads"
    parts.append(html.paragraph(f"{text}: {difference}.", "note"))
    return "\n".join(parts)


def configuration(run: Run) -> str:
    """Versions, each stage's configuration, and the weights' hashes."""
    versions = html.facts({name: str(version) for name, version in run_versions(run).items()})
    recipes = [html.folded(f"{stage.folder.name}/config.yaml", stage.recipe or NOT_RECORDED) for stage in run.stages]
    hashes = {
        f"{stage.folder.name}/{name}": f"sha256 {digest}"
        for stage in run.stages
        for name, digest in stage.manifest.get("sha256", {}).items()
        if name.endswith(".safetensors")
    }
    return "\n".join([versions, *recipes, html.heading("Weights"), html.facts(hashes)])
