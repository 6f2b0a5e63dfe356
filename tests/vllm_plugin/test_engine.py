"""vLLM's greedy tokens are those of radlads in fp32, whatever else a step of its engine holds."""

import engines
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: run make test-vllm")

WINDOW = {"window_tokens": 16, "sink_tokens": 2}
GROUP_NORM = {"balance_state": False, "groupnorm_att": True, "gate_rank_type": 1}
QWEN3 = {"qk_norm": True, "attention_bias": False, "tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
}
MIXED = {"time_mixers": ["rad_rwkv7", "qwen2", "rad_rwkv7"]}
BOTH = {"time_mixers": ["rad_rwkv6", "rad_rwkv7", "rad_rwkv7"]}
MODELS = {
    "group norm, full gate": GROUP_NORM | QWEN3,
    "softmax first": {"time_mixers": ["qwen2", "rad_rwkv7", "rad_rwkv7"], "rope_parameters": LLAMA3},
    "no gate, yarn": MIXED | {"gate_rank_type": 0, "rope_parameters": YARN},
    "window": {"mixer_settings": {"rad_rwkv7": WINDOW}},
    "window, no RoPE": {"mixer_settings": {"rad_rwkv7": WINDOW}, "use_rope": False},
    "RAD-RWKV6": {"time_mixers": ["rad_rwkv6"] * 3},
    "RAD-RWKV6 without token shift": {"time_mixers": ["rad_rwkv6"] * 3, "use_tokenshift": False},
    "softmax alone": {"time_mixers": ["qwen2"] * 3},
}
CACHED = {
    "RAD-RWKV7": {},
    "mixed, window": MIXED | {"mixer_settings": {"rad_rwkv7": WINDOW}},
    "both, window": BOTH | {"mixer_settings": {"rad_rwkv6": WINDOW}},
}


@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
def test_tokens_of_a_batch(values, tmp_path):
    folder = engines.write_model(tmp_path, **values)
    with engines.engine(folder) as llm:
        assert engines.generate(llm) == engines.expected(folder)


@pytest.mark.parametrize("values", CACHED.values(), ids=CACHED)
def test_tokens_after_cached_prefixes(values, tmp_path):
    folder = engines.write_model(tmp_path, **values)
    with engines.engine(folder, enable_prefix_caching=True) as llm:
        first, again = engines.answers(llm), engines.answers(llm)
    assert engines.tokens(first) == engines.tokens(again) == engines.expected(folder)
    assert sum(answer.num_cached_tokens for answer in first) == 0
    assert sum(answer.num_cached_tokens for answer in again) >= 256


def test_one_by_one_and_with_too_few_slots(tmp_path):
    folder = engines.write_model(tmp_path)
    expected = engines.expected(folder)
    # Slot 0 is never a real one, so that two sequences run and six wait
    with engines.engine(folder, num_gpu_blocks_override=3) as llm:
        assert engines.generate(llm) == expected
        assert [engines.generate(llm, [ids])[0] for ids in engines.prompts()] == expected


def test_tokens_of_sequences_that_lost_their_slots(tmp_path, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    lost, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *a, **b: lost.append(1) or preempt(*a, **b))
    folder = engines.write_model(tmp_path, **MIXED)
    # Each fills a block of 128 tokens, and needs another one for its answer
    asked = [(ids * 128)[: 116 + row] for row, ids in enumerate(engines.prompts())]
    with engines.engine(folder, enable_prefix_caching=True, num_gpu_blocks_override=12) as llm:
        assert engines.generate(llm, asked) == engines.expected(folder, asked)
    assert lost


def test_tokens_of_a_graph_of_torch_compile(tmp_path):
    folder = engines.write_model(tmp_path, **MIXED)
    with engines.engine(folder, enforce_eager=False, compilation_config={"backend": "eager"}) as llm:
        assert engines.generate(llm) == engines.expected(folder)


def test_weights_of_int8_are_matched(tmp_path):
    values = {"time_mixers": ["rad_rwkv6", "qwen2", "rad_rwkv7"], "gate_rank_type": 1}
    folder = engines.write_model(tmp_path, **values)
    expected = engines.expected(folder)
    assert engines.quantise_to_int8(folder) == 3 * 7 + 2
    with engines.engine(folder) as llm:
        found = engines.generate(llm)
    # vLLM rounds the inputs too, so that tokens part after a few
    assert sum(a[0] == b[0] for a, b in zip(found, expected, strict=True)) >= 5
