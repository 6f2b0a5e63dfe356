"""A teacher as it comes: a Hugging Face folder, or a hub name that is fetched into one."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from radlads.checkpoint.config_values import check_values
from radlads.checkpoint.described_weights import check_described, keep_own_head
from radlads.checkpoint.gguf_file import origin_note
from radlads.checkpoint.hf_config import refuse_activation, rope_parameters, slides
from radlads.checkpoint.hub_folder import DESCRIBING_FILES, locate_folder
from radlads.checkpoint.model_folder import STUDENT_ARCHITECTURES, read_config
from radlads.checkpoint.safetensors_files import WEIGHTS_FILE, shard_names
from radlads.checkpoint.tokenizer_files import TOKENIZER_FILE, num_ids, read_tokenizer
from radlads.checkpoint.weights import SafetensorsFolder, StoredWeights
from radlads.files import read_json
from radlads.model.configuration import RadladsConfig
from radlads.model.registry import SOFTMAX


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture implies. attention_bias: of q, k and v. head_dim: if config.json has none; 0 = C / heads."""

    attention_bias: bool
    qk_norm: bool
    head_dim: int = 0


FAMILIES = {
    "Qwen2ForCausalLM": Family(attention_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": Family(attention_bias=False, qk_norm=True, head_dim=128),
    "LlamaForCausalLM": Family(attention_bias=False, qk_norm=False),
}
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)
_READABLE = (*SUPPORTED_ARCHITECTURES, *STUDENT_ARCHITECTURES)
_WHAT = "config.json and the safetensors weights"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class TeacherSource:
    """A teacher on disk: `config` describes it as a stack of qwen2 mixers, `weights` are its tensors by name.

    `folder`: where they are, which is a file where weights come without a config.json. `notes`: what a user should know
    of it, a sentence each.
    """

    folder: Path
    config: RadladsConfig
    weights: StoredWeights
    notes: tuple[str, ...] = ()


def open_teacher(path_or_name: str | Path) -> TeacherSource:
    """Open a teacher's folder or GGUF file (see gguf_file.unpack_gguf), or fetch one by hub name (`owner/name`) or by a
    name of named_models.

    Raises ValueError if there is none of these, it is of another architecture, an adapter or quantised,
    uses a feature we lack (sliding windows, another RoPE scaling or activation, more biases), or has no readable
    safetensors weights of its sizes.
    """
    folder = locate(path_or_name)
    config = teacher_config(read_config(folder, *SUPPORTED_ARCHITECTURES), folder)
    return teacher_source(folder, config, SafetensorsFolder(folder))


def teacher_source(origin: Path, config: RadladsConfig, weights: StoredWeights) -> TeacherSource:
    """A teacher of these weights, with the head that they hold. Raises ValueError if config does not describe them."""
    check_described(config, weights, origin)
    notes = [] if (note := origin_note(origin)) is None else [note]
    if keep_own_head(config, weights):
        notes.append(f"{origin} says that its head is its embedding, but stores another lm_head.weight, which is used")
    return TeacherSource(origin, config, weights, tuple(notes))


def locate(path_or_name: str | Path) -> Path:
    """The local folder that open_teacher opens. Of a hub name, weights are fetched once its config.json has been read.

    Raises ValueError if there is neither, or its config.json is of no model that can be read.
    """
    folder = locate_folder(path_or_name, DESCRIBING_FILES, _WHAT)
    shards = sorted(shard_names(folder))
    if Path(path_or_name).expanduser().is_dir() or all((folder / name).is_file() for name in shards or [WEIGHTS_FILE]):
        return folder
    values = read_config(folder, *_READABLE)
    if set(values["architectures"]) & set(SUPPORTED_ARCHITECTURES):
        teacher_config(values, folder)
    return locate_folder(path_or_name, (WEIGHTS_FILE, *shards, *DESCRIBING_FILES), _WHAT)


def teacher_config(values: dict, folder: Path) -> RadladsConfig:
    """The config.json of a supported architecture as our configuration with softmax mixers everywhere."""
    family = FAMILIES[next(name for name in values["architectures"] if name in FAMILIES)]
    try:
        check_values(values)
        _refuse_what_we_lack(values, family)
        sizes = {name: values[name] for name in SIZES if values.get(name) is not None}
        sizes.setdefault("head_dim", family.head_dim)
        return RadladsConfig(
            **sizes,
            tie_word_embeddings=bool(values.get("tie_word_embeddings")),
            attention_bias=family.attention_bias,
            qk_norm=family.qk_norm,
            rope_parameters=rope_parameters(values),
            time_mixers=[SOFTMAX] * sizes["num_hidden_layers"],
        )
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ")
        raise ValueError(f"{folder}/config.json describes no teacher we can read: {reason}") from error


def _refuse_what_we_lack(values: dict, family: Family) -> None:
    if slides(values):
        raise ValueError("it uses sliding-window attention, which is not supported: choose a full-attention teacher")
    refuse_activation(values)
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name) and not (name == "attention_bias" and family.attention_bias):
            raise ValueError(f"it sets {name}, which is not supported for its architecture: choose one without")


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The folder's tokenizer. Raises ValueError if it is missing, unreadable, or has ids beyond `vocab_size`."""
    tokenizer = read_tokenizer(folder)
    largest = num_ids(tokenizer) - 1
    if largest >= vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER_FILE} has a token with id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}: the tokenizer belongs to another model"
        )
    return tokenizer


def open_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The folder's tokenizer as transformers has it; its `_tokenizer` neither cuts texts short nor fills them up.

    Raises ValueError as load_tokenizer does.
    """
    load_tokenizer(folder, vocab_size)
    with quiet("transformers.configuration_utils"):  # it warns of model types that are not its own
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer._tokenizer.no_truncation()
    tokenizer._tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """No warnings of this logger for a while."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def end_of_text_id(folder: Path, tokenizer: Tokenizer) -> int:
    """The id that ends a document: the tokenizer's eos_token, else the configuration's eos_token_id."""
    token = _json(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is not None:
        return found
    ids = _json(folder / "config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if not ids or not isinstance(ids[0], int):
        raise ValueError(f"{folder} names no end-of-text token: set eos_token_id in its config.json")
    return ids[0]


def _json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
