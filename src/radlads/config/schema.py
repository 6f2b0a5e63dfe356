"""Every knob of radlads, once: its name, type, default, help text and range. What a knob does is left to its user.

Imports no torch, so that `radlads --help` and configuration errors are quick. The names and defaults are those of the
released RADLADS system. The docstring below a field is its help text.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

Switch = Literal[0, 1]
"""Off or on. Files and the command line may also say true or false."""

Stage = Literal["align", "distill", "extend", "instruct"]

Optimizer = Literal["adamw", "muon", "dsfusedadamw", "adamwschedulefree", "adam8bit", "lion"]
STRATEGIES = (
    *("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "fsdp"),
    *("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"),
)
"""What train.strategy may be. The ddp_... are Lightning's names for what is all the same here."""
Precision = Literal["auto", "bf16", "bf16-mixed", "bf16-true", "fp32", "32", "32-true"]
Checkpointing = Literal["none", "selective", "full"]
DEFAULT_MIXER, SOFTMAX_MIXER, GATED_MLP = "rad_rwkv7", "qwen2", "swiglu"
"""The time mixer of a student that names none, the teacher's, and the teacher's channel mixer."""


class Range(NamedTuple):
    expectation: str
    holds: Callable[[float], bool]


POSITIVE = Range("greater than 0", lambda value: value > 0)
POSITIVE_OR_UNSET = Range("greater than 0, or -1 to follow the other rate", lambda value: value > 0 or value == -1)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
ABOVE_ONE_OR_OFF = Range("greater than 1, or 0 for off", lambda value: value > 1 or value == 0)
NOT_NEGATIVE_OR_UNSET = Range("0 or more, or -1 for unset", lambda value: value >= 0 or value == -1)
AT_LEAST_ONE = Range("1 or more", lambda value: value >= 1)
AT_LEAST_ONE_OR_ALL = Range("1 or more, or -1 for all", lambda value: value >= 1 or value == -1)
FRACTION = Range("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding."""

    base: float = 10000.0
    """Base of the frequencies: used for weights without a config.json, else checked against it; 10000 = not checked."""
    rescale: float = 1.0
    """Not available yet: must be 1."""
    rebase: float = 1.0
    """Not available yet: must be 1."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: which mixers its layers use, and sizes, which are checked against those of the model it comes from."""

    hf_path: str = ""
    """Hugging Face folder or hub name to set the student up from, where it is not the teacher; '' = the teacher."""
    classname: str = ""
    """Accepted so that released files load; no effect: sizes are always the teacher's."""
    tmix: str = DEFAULT_MIXER
    """Time mixer: rad_rwkv6, rad_rwkv7 (also by their published names qwerky6, qwerky7), qwen2, or your own."""
    tmix2: str = ""
    """Time mixer of the layers that inv_other_layer_ratio sets apart; '' = the family's softmax attention."""
    cmix: str = ""
    """Channel mixer of the layers; '' = the family's gated MLP."""
    cmix2: str = ""
    """Channel mixer of the layers that use tmix2; '' = cmix."""
    ctx_len: int = 1024
    """Tokens in one training sequence."""
    vocab_size: int = 0
    """Tokens in the vocabulary: checked against the model, whose own value is used; 0 = not checked."""
    vocab_padding_idx: int = -1
    """Accepted so that released files load; no effect: every token's embedding trains."""
    n_layer: int = 6
    """Layers: checked against the model, whose own value is used; 6 = not checked."""
    n_embd: int = 512
    """Channels of the residual stream: checked against the model, whose own value is used; 512 = not checked."""
    dim_att: int = 0
    """Channels of all query heads together: checked against the model, whose own value is used; 0 = not checked."""
    dim_ffn: int = 0
    """Channels inside the gated MLP: checked against the model, whose own value is used; 0 = not checked."""
    head_size: int = 64
    """Channels of a head: used for weights without a config.json, else checked against it; 64 = not checked."""
    num_key_value_heads: int = 0
    """Heads of keys and values: checked against the model, whose own value is used; 0 = not checked."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the norms: used for weights without a config.json, else checked against it; 1e-6 = not checked."""
    dropout: float = 0.0
    """Not available yet: must be 0."""
    inv_other_layer_ratio: float = 1.0
    """The last 1/r of the layers use tmix2 and cmix2: 3 = the last third; 1 = none."""
    preserve_last_n_layers: int = 0
    """Number of layers at the end of the stack that keep the teacher's softmax attention."""
    softmax_layers: str = ""
    """Layers, counted from 0, that keep the teacher's softmax attention: 5,12 or 3-6; every:4 = the last of each four;
    last:4; auto:2 = the two that radlads select finds, which run as the other layers do until stage 2 begins. They win
    over tmix, tmix2 and preserve_last_n_layers. Files may give a list."""
    layer_mixers: str = ""
    """Time mixers of single layers: 0-3:rad_rwkv6,12:qwen2, the layers written as in softmax_layers, over which this
    wins. Files may give a mapping."""
    mixer: dict[str, Any] = field(default_factory=dict)
    """Settings that the stack's mixers define themselves, each given as --model.mixer.KEY VALUE, or as a mapping in a
    file. radlads mixers NAME lists a mixer's."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""
    attention_type: str = ""
    """Accepted so that released files load; no effect: the kernel is the best one for the device."""
    reinit_att: Switch = 0
    """1 = start from random attention projections, not the teacher's: an ablation, clearly worse."""
    gate_rank_type: Literal[0, 1, 2] = 1
    """Output gate of a recurrent mixer: 0 = none, 1 = full rank, 2 = low rank."""
    lora_rank_gate: int = 0
    """Rank of the low-rank gate; 0 = a rule of n_embd. No effect unless gate_rank_type is 2."""
    lora_rank_tokenshift: int = 0
    """Rank of the token-shift mixing; 0 = a rule of n_embd. RAD-RWKV6 only, with use_tokenshift."""
    lora_rank_decay: int = 0
    """Rank of the decay; 0 = a rule of n_embd."""
    lora_rank_iclr: int = 0
    """Rank of the in-context learning rate; 0 = a rule of n_embd. RAD-RWKV7 only."""
    lora_rank_value_residual_mix: int = 0
    """Rank of the value residual's mixing; 0 = a rule of n_embd. RAD-RWKV7 only."""
    use_pos_emb: Switch = 1
    """1 = recurrent mixers rotate queries and keys (RoPE). No effect on softmax layers, which always do."""
    balance_state: Switch = 1
    """1 = scale what is written to the state by what decays from it, so that it stays balanced without a GroupNorm."""
    groupnorm_att: Switch = 1
    """1 = GroupNorm over the heads' outputs; destabilises training from about 14B parameters."""
    use_tokenshift: Switch = 1
    """1 = mix every token's input with the previous token's. RAD-RWKV6 only."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen softmax model to learn from, and how much."""

    path: str = ""
    """The teacher: a Hugging Face folder, hub name or weights file; '' = hf_path; both '' = no teacher, or in the align
    stage what the student is set up from."""
    hf_path: str = ""
    """As path, which comes first where both are set. Released files say train.teacher.model.hf_path."""
    kl_weight: float = 0.5
    """Weight of KL(teacher || student) on logits. Extend stage only; naming a teacher there switches it on."""
    ce_weight: float = 0.5
    """Weight of cross-entropy on the labels. Extend stage only; without a teacher it counts as 1."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(tmix=SOFTMAX_MIXER))
    """Sizes of the teacher, checked as the student's are; the other keys have no effect."""

    def __post_init__(self) -> None:
        _check_model(self.model, "train.teacher.model")
        _check_ranges(self, "train.teacher", NOT_NEGATIVE, ["kl_weight", "ce_weight"])
        if self.kl_weight == self.ce_weight == 0:
            raise ValueError(
                "train.teacher.kl_weight and train.teacher.ce_weight are both 0: set one of them above 0 to have a loss"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training stage."""

    load_model: str = ""
    """Model folder or weights file (.pth, .safetensors) to start from; '' or auto = set the student up from the teacher
    (align stage only). FOLDER/rwkv-final.pth also means the finished stage FOLDER."""
    load_partial: Switch = 0
    """Accepted so that released files load; no effect: the align stage always sets up what the teacher's weights lack,
    and an earlier stage's must be whole."""
    attention_distillation_stage: int = -1
    """1 = align the mixers with the teacher's attention, 2 = distil the logits, -1 = extend the context, 4 = instruct:
    distil what the assistant writes in conversations."""
    train_stage: int = 0
    """Accepted so that released files load; no effect."""
    trainable: Literal["auto", "mixer", "decay", "all", "no_softmax"] = "auto"
    """Which parameters train: mixer, decay (with token shift), all, no_softmax (all but the attention of layers that
    keep softmax); auto = mixer in the align stage, all elsewhere."""
    align_loss: Literal["l2", "mse"] = "l2"
    """Distance between teacher attention and student mixer: l2 = norm over channels / sqrt(C). Align stage only."""
    seed_everything: int = 1337
    """Seed of all random numbers."""
    proj_dir: str = "out"
    """Folder that holds the run folders."""
    proj_name: str = ""
    """Name of the run folder; '' = L{n_layer}-D{n_embd}-{tmix}_{tmix2}[-{proj_suffix0}]-{proj_suffix}."""
    proj_suffix0: str = ""
    """First suffix of the run folder's name. No effect when '' or when proj_name is set."""
    proj_suffix: str = "0"
    """Last suffix of the run folder's name. No effect when proj_name is set."""
    wandb: str = ""
    """Project of Weights & Biases to log to, beside the files; '' = none. WANDB_MODE=offline writes files alone."""
    epoch_begin: int = 0
    """Not available yet: must be 0."""
    epoch_save: int = 5
    """Accepted so that released files load; no effect: the model is written when the stage is complete."""
    micro_bsz: int = 12
    """Sequences per device in one forward pass. Global batch: micro_bsz x accumulate_grad_batches x all devices."""
    accumulate_grad_batches: int = 1
    """Forward passes per optimiser step."""
    grad_cp: Switch = 0
    """1 = activation_checkpointing full, under the released system's name."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """What the backward pass recomputes to save memory: none; selective = time mixers; full = whole blocks, about a
    third more time; auto = as grad_cp says. No effect in the align stage."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Run the blocks through torch.compile; auto = on CUDA with Triton."""
    cuda_graphs: Literal["auto", "always", "never"] = "auto"
    """Record a batch's forward and backward pass as a CUDA graph, which takes the host next to nothing to run; auto =
    where our own mixers are compiled, and the stage aligns or gradients take a tenth of the GPU's memory at most. Never
    where labels are counted (mask_labels_at_eos, reset_state_at_eos), and under ddp alone."""
    gradient_clip_val: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it. 0 = no clipping."""
    spike_factor: float = 0.0
    """A step whose loss is more than this times the usual loss changes no weight, and the third in a row ends the
    stage; 0 = every finite loss is fine."""
    optimizer: Optimizer = "adamw"
    """Update rule: adamw; muon (the blocks' matrices by Muon, the rest by AdamW); adamwschedulefree, lion, adam8bit and
    dsfusedadamw, the last two on a GPU, each with its own package. Lion wants rates three to ten times smaller."""
    lr_init: float = 6e-4
    """Learning rate after warm-up of everything but the mixers."""
    lr_final: float = 1e-5
    """Learning rate at the end of the decay of everything but the mixers."""
    lr2_init: float = -1.0
    """Learning rate after warm-up of the mixers; -1 = lr_init."""
    lr2_final: float = -1.0
    """Learning rate at the end of the decay of the mixers; -1 = lr_final."""
    lr_decay_type: Literal["cos", "linear", "exp", "oneminussqrt"] = "cos"
    """Curve between initial and final rate; cos is a quarter cosine. No effect when both rates are equal."""
    lr_wait: float = 0.0
    """Fraction of the tokens after warm-up at which the decay begins."""
    lr_endpoint: float = 1.0
    """Fraction of the tokens after warm-up at which the decay ends; the rate is flat from there."""
    warmup_steps: int = -1
    """Optimiser steps over which the rate rises linearly from 1 %; -1 or 0 = none."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean."""
    beta2: float = 0.99
    """Adam's decay of the gradient's square."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of time mixers and of the other matrices."""
    weight_decay_final: float = -1.0
    """Not available yet: must be -1."""
    data_file: str = ""
    """Training tokens: path of a .bin/.idx pair, without the extension; several with weights, as in a:0.9,b:0.1."""
    validation_data_file: str = ""
    """Held-out tokens: path of a .bin/.idx pair, without the extension; '' = no held-out evaluation."""
    data_type: Literal["binidx"] = "binidx"
    """Format of the data files."""
    heldout_tail_tokens: int = 0
    """Tokens at the end of data_file to hold out instead of a validation_data_file; 0 = none."""
    magic_prime: int | Literal["auto"] = 0
    """Prime that orders the samples; auto or 0 = the largest one = 2 (mod 3) below the number of sequences."""
    mask_labels_at_eos: Switch = 0
    """1 = no loss where the input ends a document: what follows is another document's. No effect when aligning, whose
    loss has no labels."""
    reset_state_at_eos: Switch = 0
    """1 = every document in a row is a text of its own, for student and teacher: states, attention and positions start
    anew, and no document's first token is predicted."""
    eos_token_id: int = -1
    """Token that ends a document; -1 = the model's. No effect without one of the two keys above."""
    on_policy_share: float = 0.0
    """Share of the rows whose last replies the student writes itself, for the teacher to score; 0 = none. Instruct
    stage only, as the other on_policy_ keys."""
    on_policy_kl: Literal["forward", "reverse", "mixed"] = "mixed"
    """What is learnt from such rows: forward = KL(teacher || student), reverse = KL(student || teacher), mixed = half
    of each. Rows of the corpus have the forward one."""
    on_policy_every_steps: int = 8
    """Optimiser steps for which the student writes at a time, many replies together."""
    on_policy_max_tokens: int = 256
    """Longest reply that the student writes; one that does not end before is learnt from as it is."""
    on_policy_temperature: float = 1.0
    """At which the student draws its tokens; 1 = its own distribution, 0 = always the likeliest."""
    my_exit_tokens: int = 0
    """The stage's token budget; 0 = one pass of the data."""
    heldout_tokens: int = 65536
    """Held-out tokens per evaluation. No effect without validation_data_file."""
    heldout_every_steps: int = 0
    """Optimiser steps between held-out evaluations; 0 = only before and after the stage."""
    val_check_interval: float | None = None
    """Accepted so that released files load; no effect: heldout_every_steps says when to evaluate."""
    check_val_every_n_epoch: int | None = None
    """Accepted so that released files load; no effect: heldout_every_steps says when to evaluate."""
    log_every_n_steps: int = 50
    """Optimiser steps between rows of metrics."""
    resume: str = "auto"
    """Where to begin: auto = at the newest checkpoint of this run, if its folder holds one; never = anew, and whatever
    an unfinished run has left is thrown away; or the path of a checkpoint."""
    checkpoint_every_minutes: float = 30.0
    """Minutes between checkpoints, from which a run that was killed goes on; 0 = not by time."""
    checkpoint_every_steps: int = 0
    """Optimiser steps between checkpoints; 0 = not by steps."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay while the stage runs; a finished stage has none."""
    precision: Precision = "bf16"
    """bf16 = bf16 products on fp32 weights; bf16-true = bf16 weights, gradients and moments: half the memory, but an
    update below 1/512 of its weight is lost; auto = bf16 where the hardware multiplies it, fp32 elsewhere."""
    teacher_precision: Literal["same", "fp8"] = "same"
    """same = the teacher computes as the student does; fp8 = the matrices of its blocks are rounded to 8 bits while a
    stage trains, held-out measurements in it included: half the memory and faster, on a GPU from Hopper on."""
    accelerator: Literal["gpu", "cuda", "cpu", "mps", "auto"] = "gpu"
    """Hardware to train on."""
    strategy: str = "auto"
    """How several processes share the work: ddp = each holds both models whole; fsdp = each holds its rows of every
    parameter, of the teacher's too; deepspeed_stage_1 = as ddp, with the optimiser in shards; deepspeed_stage_2 =
    gradients too; deepspeed_stage_3 = all, as fsdp; MODULE:CLASS = an engine of your own (docs/engines.md); auto = ddp.
    No effect on one device."""
    devices: int = 1
    """Processes on each node, one GPU each; -1 = all GPUs of the node."""
    num_nodes: int = 1
    """Nodes. Start the command on each of them, by torchrun or srun (docs/scaling.md)."""
    ds_bucket_mb: int = 200
    """Millions of numbers that DeepSpeed reduces or gathers at a time. No effect under other strategies."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""

    def __post_init__(self) -> None:
        _check_choices(self, "train")
        if self.magic_prime != "auto":
            _check_ranges(self, "train", NOT_NEGATIVE, ["magic_prime"])
        for limits, names in _TRAIN_RANGES.items():
            _check_ranges(self, "train", limits, names)
        if self.validation_data_file and self.heldout_tail_tokens:
            raise ValueError(
                "train.validation_data_file and train.heldout_tail_tokens both name held-out text: set one of them"
            )
        if self.lr_wait > self.lr_endpoint:
            raise ValueError(
                f"train.lr_wait must be at most train.lr_endpoint, which is {self.lr_endpoint}, not {self.lr_wait}"
            )
        if self.strategy not in STRATEGIES and ":" not in self.strategy:
            raise ValueError(f"train.strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        if self.grad_cp and self.activation_checkpointing not in ("auto", "full"):
            raise ValueError(
                f"train.grad_cp 1 means full activation checkpointing, but train.activation_checkpointing is "
                f"{self.activation_checkpointing!r}: set grad_cp to 0"
            )
        stage_of(self)
        self._check_instruct()
        self._check_cuda_graphs()

    def _check_instruct(self) -> None:
        if stage_of(self) != "instruct":
            return
        refused = {
            "reset_state_at_eos": "which reads every conversation by itself anyway",
            "mask_labels_at_eos": "which learns what the assistant wrote alone",
            "heldout_tail_tokens": "whose rows hold whole conversations: set train.validation_data_file",
        }
        for key, why in refused.items():
            if getattr(self, key):
                raise ValueError(f"train.{key} must be 0 in the instruct stage, {why}, not {getattr(self, key)}")

    def _check_cuda_graphs(self) -> None:
        if self.cuda_graphs != "always":
            return
        counts_labels = "whose labels are counted batch by batch"
        has_hooks = self.strategy not in ("auto", "ddp") and (self.devices != 1 or self.num_nodes > 1)
        refused = {
            "train.reset_state_at_eos": (self.reset_state_at_eos, counts_labels),
            "train.mask_labels_at_eos": (self.mask_labels_at_eos and stage_of(self) != "align", counts_labels),
            "train.attention_distillation_stage 4": (stage_of(self) == "instruct", counts_labels),
            f"train.strategy {self.strategy}": (has_hooks, "whose hooks cannot be recorded"),
        }
        for setting, (is_set, why) in refused.items():
            if is_set:
                raise ValueError(f"train.cuda_graphs must be 'auto' or 'never' with {setting}, {why}, not 'always'")


_TRAIN_RANGES: dict[Range, list[str]] = {
    POSITIVE: ["lr_init", "lr_final", "adam_eps"],
    POSITIVE_OR_UNSET: ["lr2_init", "lr2_final"],
    FRACTION: ["lr_wait", "lr_endpoint", "on_policy_share"],
    ABOVE_ONE_OR_OFF: ["spike_factor"],
    BELOW_ONE: ["beta1", "beta2"],
    NOT_NEGATIVE: [
        *("seed_everything", "gradient_clip_val", "weight_decay", "epoch_begin", "epoch_save"),
        *("my_exit_tokens", "heldout_tail_tokens", "heldout_every_steps", "on_policy_temperature"),
        *("checkpoint_every_minutes", "checkpoint_every_steps"),
    ],
    NOT_NEGATIVE_OR_UNSET: ["warmup_steps", "weight_decay_final", "eos_token_id"],
    AT_LEAST_ONE: [
        *("micro_bsz", "accumulate_grad_batches", "log_every_n_steps", "num_nodes", "ds_bucket_mb", "heldout_tokens"),
        *("keep_checkpoints", "on_policy_every_steps", "on_policy_max_tokens"),
    ],
    AT_LEAST_ONE_OR_ALL: ["devices"],
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model and the stage that trains it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The student."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The stage."""

    def __post_init__(self) -> None:
        _check_model(self.model, "model")


def check_available(config: Config) -> None:
    """Raise ValueError for a key that asks for something which is not available yet."""
    model, train, defaults = config.model, config.train, Config()
    wanted: list[tuple[str, object, object]] = [
        *((f"model.{name}", getattr(model, name), getattr(defaults.model, name)) for name in _UNAVAILABLE_MODEL_KEYS),
        *((f"model.rope.{name}", getattr(model.rope, name), 1.0) for name in ("rescale", "rebase")),
        *((f"train.{name}", getattr(train, name), getattr(defaults.train, name)) for name in _UNAVAILABLE_TRAIN_KEYS),
    ]
    for key, value, default in wanted:
        if value != default:
            remedy = f"set --{key} {default if default != '' else repr('')}"
            raise ValueError(f"{key} is {value!r}, but what that asks for is not available yet: {remedy}")


_UNAVAILABLE_MODEL_KEYS = ("dropout",)
_UNAVAILABLE_TRAIN_KEYS = (
    "weight_decay_final",
    "epoch_begin",
)


def without_effect(config: Config) -> list[str]:
    """The dotted keys that are set to something but can change nothing, in the schema's order."""
    model, teacher, train = config.model, config.train.teacher.model, config.train
    return [
        *_set_to_something(model, ModelConfig(), "model", _IDLE_MODEL_KEYS),
        *_set_to_something(train, TrainConfig(), "train", _IDLE_TRAIN_KEYS + _idle_beside_others(train)),
        *_set_to_something(teacher, TeacherConfig().model, "train.teacher.model", _idle_teacher_model_keys()),
    ]


def _set_to_something(part: object, default: object, prefix: str, names: Iterable[str]) -> list[str]:
    return [f"{prefix}.{name}" for name in names if getattr(part, name) != getattr(default, name)]


_IDLE_MODEL_KEYS = ("classname", "vocab_padding_idx", "attention_type")
_IDLE_TRAIN_KEYS = ("load_partial", "train_stage", "epoch_save", "val_check_interval", "check_val_every_n_epoch")


def _idle_beside_others(train: TrainConfig) -> tuple[str, ...]:
    without_teacher = () if train.teacher.path or train.teacher.hf_path else ("teacher_precision",)
    of_deepspeed = () if train.strategy.startswith("deepspeed") else ("ds_bucket_mb",)
    if stage_of(train) == "instruct":
        return (*without_teacher, *of_deepspeed, "magic_prime", "eos_token_id")
    return (*without_teacher, *of_deepspeed, *ON_POLICY_KEYS)


ON_POLICY_KEYS = (
    *("on_policy_share", "on_policy_kl", "on_policy_every_steps", "on_policy_max_tokens", "on_policy_temperature"),
)
"""Of the instruct stage alone; configurations of earlier versions lack them."""


SIZE_KEYS = (
    *("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn", "head_size", "num_key_value_heads", "rms_norm_eps"),
    "rope",
)
"""Keys of a model section that say how large it is."""


def _idle_teacher_model_keys() -> list[str]:
    """All but sizes and mixer: a teacher's section has the student's keys, but it is a finished model."""
    return [entry.name for entry in fields(ModelConfig) if entry.name not in (*SIZE_KEYS, "tmix")]


def stage_of(train: TrainConfig) -> Stage:
    """The stage that train.attention_distillation_stage stands for. ValueError unless it is 1, 2, 4 or -1."""
    match train.attention_distillation_stage:
        case 1:
            return "align"
        case 2:
            return "distill"
        case -1:
            return "extend"
        case 4:
            return "instruct"
    raise ValueError(
        "train.attention_distillation_stage must be 1 to align, 2 to distill, -1 to extend or 4 to instruct, "
        f"not {train.attention_distillation_stage}"
    )


def checkpointing_of(train: TrainConfig) -> Checkpointing:
    """What train.activation_checkpointing and train.grad_cp together mean; aligning recomputes nothing."""
    if stage_of(train) == "align":
        return "none"
    if train.activation_checkpointing != "auto":
        return train.activation_checkpointing
    return "full" if train.grad_cp else "none"


# ModelConfig occurs twice, so whoever holds one checks it, knowing its dotted key.
def _check_model(model: ModelConfig, prefix: str) -> None:
    _check_choices(model, prefix)
    _check_ranges(model, prefix, AT_LEAST_ONE, ["ctx_len", "n_layer", "n_embd", "head_size", "inv_other_layer_ratio"])
    _check_ranges(model, prefix, POSITIVE, ["rms_norm_eps"])
    _check_ranges(model, prefix, BELOW_ONE, ["dropout"])
    _check_ranges(model, prefix, NOT_NEGATIVE_OR_UNSET, ["vocab_padding_idx"])
    sizes = ["vocab_size", "dim_att", "dim_ffn", "num_key_value_heads", "preserve_last_n_layers"]
    ranks = [entry.name for entry in fields(model) if entry.name.startswith("lora_rank_")]
    _check_ranges(model, prefix, NOT_NEGATIVE, sizes + ranks)
    _check_ranges(model.rope, f"{prefix}.rope", POSITIVE, ["base", "rescale", "rebase"])
    _check_settings(model.mixer, f"{prefix}.mixer")


def _check_settings(settings: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for what no setting of a mixer can be; its own type and range are the mixer's to check."""
    for name, value in settings.items():
        is_value = isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        if not is_value:
            raise ValueError(f"{prefix}.{name} must be a finite number, text, or true or false, not {value!r}")


def _check_choices(config: ModelConfig | TrainConfig, prefix: str) -> None:
    for entry in fields(config):
        value = getattr(config, entry.name)
        choices = get_args(entry.type)
        if get_origin(entry.type) is Literal and value not in choices:
            raise ValueError(f"{prefix}.{entry.name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_ranges(config: object, prefix: str, limits: Range, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and limits.holds(value)):
            raise ValueError(f"{prefix}.{name} must be {limits.expectation}, not {value}")
