"""The teacher is our own class with softmax in every layer: its logits are those of transformers' Qwen2."""

import pytest
import torch
from tolerances import PARITY
from transformers import Qwen2Config, Qwen2ForCausalLM

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

LENGTH = 33
SHARED = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build_pair(tied=False, rms_norm_eps=1e-6, rope_theta=1e6):
    """A random Qwen2 with non-zero biases and unequal norms, and ours with the same tensors."""
    torch.manual_seed(0)
    changes = SHARED | {"tie_word_embeddings": tied, "rms_norm_eps": rms_norm_eps}
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    theirs = Qwen2ForCausalLM(Qwen2Config(**changes, rope_parameters=rope)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name or "norm" in name or "_proj" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = RadladsForCausalLM(RadladsConfig(**changes, rope_theta=rope_theta, time_mixers=["qwen2"] * 3)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(
    params=[
        {"tied": False},
        {"tied": True},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 1e4},
        {"tied": True, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
    ],
    ids=str,
)
def pair(request):
    return build_pair(**request.param)


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def difference(theirs, ours, **inputs):
    """Largest difference of the logits, which must be of order 1, at real tokens."""
    with torch.no_grad():
        expected, actual = theirs(**inputs).logits, ours(**inputs).logits
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert 0.1 < expected[real].std() < 10
    return (actual - expected)[real].abs().max().item()


def test_logits(pair, ids):
    assert difference(*pair, input_ids=ids) < PARITY


def test_logits_of_left_padded_rows(pair, ids):
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    assert difference(*pair, input_ids=ids, attention_mask=mask, position_ids=positions) < PARITY


def test_positions_default_to_those_of_the_real_tokens(ids):
    _, ours = build_pair()
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    cache = RadladsCache(ours.config)
    with torch.no_grad():
        default = ours(ids, attention_mask=mask, past_key_values=cache).logits
        given = ours(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.equal(default[mask.bool()], given[mask.bool()])
    assert cache.next_positions.tolist() == [LENGTH - 11, LENGTH]


def test_logits_with_cache(pair, ids):
    theirs, ours = pair
    past = {theirs: None, ours: None}
    for start, stop in [(0, 20), (20, 21), (21, LENGTH)]:
        logits = {}
        for model in past:
            with torch.no_grad():
                outputs = model(ids[:, start:stop], past_key_values=past[model], use_cache=True)
            logits[model], past[model] = outputs.logits, outputs.past_key_values
        assert (logits[ours] - logits[theirs]).abs().max() < PARITY


def test_greedy_tokens_of_a_padded_batch(pair, ids):
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs, ours = (model.generate(ids, attention_mask=mask, **settings) for model in pair)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-5}, {"rope_theta": 1e4}], ids=str)
def test_the_comparison_sees_epsilon_and_theta(ids, changes):
    theirs, _ = build_pair()
    _, ours = build_pair(**changes)
    assert difference(theirs, ours, input_ids=ids) > 10 * PARITY


def test_tied_models_share_one_tensor():
    _, ours = build_pair(tied=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 4.0}, "RoPE scaling 'dynamic' is not supported: use one of default"),
        ({"rope_type": "linear"}, "'linear' needs a positive factor, not None"),
        ({"rope_type": "yarn", "factor": "4"}, "'yarn' needs a positive factor, not '4'"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "needs a positive low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
    ],
)
def test_a_rope_we_lack_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        RadladsConfig(**SHARED, rope_parameters={"rope_theta": 1e6, **rope})
