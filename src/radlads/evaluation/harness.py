"""The only door to lm-eval, which runs in this process: which tasks there are, and a model's results on them.

lm-eval is an optional package, so it is imported inside functions.
"""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from radlads.convert.hf_source import quiet
from radlads.evaluation.likelihood import Answer, log_likelihoods
from radlads.inference.chat_template import template_errors_named
from radlads.inference.finite import FiniteWatch
from radlads.model.modeling import RadladsForCausalLM

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM as _HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase
else:
    _HFLM = object

_log = logging.getLogger(__name__)
# Of standard errors that have no formula (perplexities); lm-eval's own 100,000 take minutes
_BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How tasks are run. limit: questions of each task, below 1 a share of them; None = all. num_fewshot: None leaves
    it to the task. max_tokens: of one text; None = the model's max_position_embeddings. questions: the numbers of those
    to ask, by task, in place of a limit."""

    batch_rows: int = 8
    num_fewshot: int | None = None
    limit: float | None = None
    max_tokens: int | None = None
    chat_template: bool = False
    questions: Mapping[str, Sequence[int]] | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks, groups and tags by name, all known to the manager."""

    names: list[str]
    manager: "TaskManager"


def share_work(device: torch.device) -> bool:
    """Join the other processes that torchrun or accelerate launched, if any, and take this one's GPU, before models are
    loaded. Returns whether this process is the one that is told the results."""
    if not _is_one_of_many():
        return True
    _check_lm_eval()
    from accelerate import Accelerator, InitProcessGroupKwargs

    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))  # for the slowest process
    return bool(Accelerator(cpu=device.type == "cpu", kwargs_handlers=[waiting]).is_main_process)


def open_tasks(
    names: Sequence[str], include_path: Path | None = None, metadata: Mapping[str, Any] | None = None
) -> Tasks:
    """The tasks of these names or patterns (`mmlu_*`), from a folder of task files first, then lm-eval's own.

    metadata: what tasks that make their own questions are told, such as RULER's `max_seq_lengths` and `tokenizer`.
    Raises ValueError for a missing lm-eval or folder, and for names that nothing answers to.
    """
    _check_lm_eval()
    from lm_eval.tasks import TaskManager

    told = None if metadata is None else dict(metadata)
    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(f"{include_path} is not a folder: --include-path takes one with lm-eval's task files")
        own = TaskManager(include_path=str(include_path), include_defaults=False, metadata=told)
        found = {name: own.match_tasks([name]) for name in names}
        if all(found.values()) and not {name for some in found.values() for name in some} & set(own.all_groups):
            return Tasks(_flat(found), own)  # all of lm-eval's own take ten seconds to index
    manager = TaskManager(include_path=None if include_path is None else str(include_path), metadata=told)
    found = {name: manager.match_tasks([name]) for name in names}
    for name in (name for name, matches in found.items() if not matches):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        meant = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists the known ones"
        raise ValueError(f"there is no task {name!r}: {meant}")
    return Tasks(_flat(found), manager)


def run_tasks(
    model: RadladsForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Tasks,
    settings: Settings,
    *,
    cache: Path | None = None,
) -> dict[str, Any] | None:
    """lm-eval's results of the model, None in processes that only help. `cache`: the start of the name of the file
    where answers are kept and found again.

    settings.chat_template: of a tokenizer that has one. Raises ValueError for more tokens than a model with softmax
    layers knows, OSError for a data set that cannot be fetched.
    """
    check_max_tokens(model, settings.max_tokens)
    from lm_eval import simple_evaluate

    limit = settings.limit
    results = simple_evaluate(
        language_model(model, tokenizer, batch_rows=settings.batch_rows, max_tokens=settings.max_tokens),
        tasks=list(tasks.names),
        task_manager=tasks.manager,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_rows,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        samples=None if settings.questions is None else {name: list(each) for name, each in settings.questions.items()},
        use_cache=None if cache is None else str(cache),
        apply_chat_template=settings.chat_template,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
    )
    return None if results is None else dict(results)


def language_model(
    model: RadladsForCausalLM,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_rows: int = 1,
    max_tokens: int | None = None,
    segment_tokens: int = 8192,
) -> "LM":
    """lm-eval's `hf` model, except that log likelihoods are ours: fp32 sums, long texts in pieces."""
    _check_lm_eval()
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    class RadladsLM(_OwnAnswers, HFLM):
        pass

    with quiet("lm_eval.models.huggingface"):  # it warns of models that are given as such
        lm = RadladsLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch_rows, max_length=max_tokens)
    lm.decoder, lm.batch_rows, lm.segment_tokens = model, batch_rows, segment_tokens
    if _is_one_of_many():  # HFLM leaves that to whoever gives it a model as such
        accelerator = Accelerator()
        lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
    return lm


class _OwnAnswers(_HFLM):
    """What our model does otherwise than lm-eval's HFLM, which is to be the next base class."""

    decoder: RadladsForCausalLM
    batch_rows: int
    segment_tokens: int

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        from tqdm import tqdm

        longer = sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
        if longer:
            _log.warning("%d texts of more than %d tokens lose their start (--max-length)", longer, self.max_length)
        is_hidden = disable_tqdm or override_bs is not None or self.rank > 0
        bar = tqdm(total=len(requests), desc="log likelihoods", disable=is_hidden)

        def keep(number: int, answer: Answer) -> None:
            bar.update(1)
            if (asked := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)

        with bar:  # closed, so that what is said next has a line of its own
            return log_likelihoods(
                self.decoder,
                [(context, continuation) for _, context, continuation in requests],
                max_tokens=self.max_length,
                batch_rows=self.batch_rows,
                segment_tokens=self.segment_tokens,
                on_answer=keep,
            )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **keys: Any
    ) -> str:
        with template_errors_named(f"of {self.tokenizer.name_or_path}"):
            return str(super().apply_chat_template(chat_history, add_generation_prompt, **keys))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        for request in requests:
            wanted = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise ValueError(
                    f"{request.task_name} generates {wanted} tokens, which leaves no room for a question in "
                    f"{self.max_length}: give a --max-length above that"
                )
        answers: list[str] = super().generate_until(requests, disable_tqdm)
        return answers

    def _model_generate(self, *arguments: Any, **keys: Any) -> torch.Tensor:
        with FiniteWatch(self.decoder) as watch:
            tokens: torch.Tensor = super()._model_generate(*arguments, **keys)
            watch.check()
        return tokens


def check_max_tokens(model: RadladsForCausalLM, max_tokens: int | None) -> None:
    """Raise ValueError if a softmax layer would meet positions it was not made for."""
    known = model.config.max_position_embeddings
    if max_tokens is not None and max_tokens > known and "full_attention" in model.config.layer_types:
        raise ValueError(
            f"a model with softmax layers and {known} positions cannot read {max_tokens} tokens: give --max-length "
            f"{known} or less, or evaluate the recurrent student alone"
        )


def _is_one_of_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _check_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ValueError(f"evaluating needs lm-eval: pip install 'radlads[eval]' ({error})") from error


def _flat(found: Mapping[str, list[str]]) -> list[str]:
    """All matches, each once, in the order they were asked for."""
    return list(dict.fromkeys(name for matches in found.values() for name in matches))
