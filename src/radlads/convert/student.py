"""Building the two models of a conversion: the frozen teacher, and the student as setup leaves it."""

from collections import Counter

import torch

from radlads.config.layer_lists import mixers_by_layer
from radlads.config.schema import ModelConfig
from radlads.convert.blueprint import Blueprint
from radlads.convert.hf_source import SIZES, TeacherSource
from radlads.convert.weight_map import transfer
from radlads.model.configuration import RadladsConfig, layer_type_of
from radlads.model.mixer_settings import settings_by_mixer, to_store
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import mixer_class, registered_name


def build_teacher(source: TeacherSource, *, dtype: torch.dtype = torch.float32) -> RadladsForCausalLM:
    """The teacher with its weights, frozen and in evaluation mode."""
    teacher, _ = teacher_blueprint(source).build(dtype=dtype)
    return teacher.eval().requires_grad_(False)


def build_student(source: TeacherSource, model: ModelConfig) -> tuple[RadladsForCausalLM, Counter]:
    """The student of student_blueprint in fp32, in evaluation mode, and the transfer's row counts."""
    student, rows = student_blueprint(source, model).build()
    return student.eval(), rows


def teacher_blueprint(source: TeacherSource) -> Blueprint:
    """The teacher with its weights. A head that is built apart from the embedding gets a copy of it."""
    tied = source.config.tie_word_embeddings

    def fill(teacher: RadladsForCausalLM) -> Counter:
        return transfer(source.weights, teacher, source.folder, tied=tied)

    return Blueprint(source.config, fill)


def student_blueprint(source: TeacherSource, model: ModelConfig) -> Blueprint:
    """The student with the teacher's weights and fresh mixer parameters.

    Fresh parameters are drawn from torch's global random state, layer by layer: seed it for a repeatable student. A
    tied teacher's head is untied, because the student's head is trained on its own.
    """
    tied, reinit_att = source.config.tie_word_embeddings, bool(model.reinit_att)

    def fill(student: RadladsForCausalLM) -> Counter:
        return transfer(source.weights, student, source.folder, tied=tied, reinit_att=reinit_att)

    return Blueprint(student_config(source.config, model), fill)


def retie(student: RadladsForCausalLM, source: TeacherSource) -> None:
    """Drop the student's updated head and use its embedding as the head again, as its teacher does.

    For the finished student: training and files after this know one tensor. Raises ValueError if the teacher's head is
    its own, for then the embedding is no head.
    """
    if not source.config.tie_word_embeddings:
        raise ValueError(f"{source.folder} has a head of its own, not its embedding: export its student without retie")
    student.config.tie_word_embeddings = True
    student.lm_head.weight = student.model.embed_tokens.weight


def student_config(teacher: RadladsConfig, model: ModelConfig) -> RadladsConfig:
    """The teacher's configuration with the mixers, their settings and the switches that `model` names.

    Raises ValueError as layer_lists.mixers_by_layer, for a mixer that cannot be found, and as
    mixer_settings.settings_by_mixer for settings.
    """
    time_mixers = layer_mixers(model, teacher.num_hidden_layers)
    kinds = {name: mixer_class(name) for name in time_mixers}
    settings = {name: kind.Settings for name, kind in kinds.items()}
    return RadladsConfig(
        **{name: getattr(teacher, name) for name in (*SIZES, "attention_bias", "qk_norm")},
        tie_word_embeddings=False,
        rope_parameters=dict(teacher.rope_parameters),
        time_mixers=time_mixers,
        channel_mixers=mixers_by_layer(model, teacher.num_hidden_layers).channel,
        layer_types=[layer_type_of(kinds[name]) for name in time_mixers],
        mixer_settings=to_store(settings, settings_by_mixer(settings, model.mixer)),
        use_rope=bool(model.use_pos_emb),
        gate_rank_type=model.gate_rank_type,
        balance_state=bool(model.balance_state),
        groupnorm_att=bool(model.groupnorm_att),
        use_tokenshift=bool(model.use_tokenshift),
        lora_rank_tokenshift=model.lora_rank_tokenshift,
        lora_rank_decay=model.lora_rank_decay,
        lora_rank_iclr=model.lora_rank_iclr,
        lora_rank_value_residual_mix=model.lora_rank_value_residual_mix,
        lora_rank_gate=model.lora_rank_gate,
    )


def layer_mixers(model: ModelConfig, layers: int) -> list[str]:
    """The time mixer of each layer, by its registered name. Raises ValueError as layer_lists.mixers_by_layer."""
    return [registered_name(name) for name in mixers_by_layer(model, layers).time]
