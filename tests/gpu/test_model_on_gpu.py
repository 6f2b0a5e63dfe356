"""Whole models on a GPU: decoding is prefill, padding is nothing, and a 7B-shaped stack is what it is on the CPU."""

import copy
from contextlib import ExitStack

import pytest
import torch
from gpu_comparison import (
    DEVICE,
    DRY_RUN,
    Comparison,
    assert_within_bounds,
    kernels,
    mixers_call,
    oracle,
)
from tolerances import relative_error

from radlads.model.cache import RadladsCache
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

pytestmark = pytest.mark.gpu

BALANCED = {"balance_state": True, "groupnorm_att": False}
NORMED = {"balance_state": False, "groupnorm_att": True}
RWKV6 = {"use_tokenshift": True, "gate_rank_type": 1, "use_rope": False, **BALANCED}
STACKS = {
    "rwkv7-balanced": {"time_mixers": ["rad_rwkv7"] * 3, **BALANCED},
    "rwkv7-normed": {"time_mixers": ["rad_rwkv7"] * 3, **NORMED},
    "rwkv6": {"time_mixers": ["rad_rwkv6"] * 3, **RWKV6},
    "both and softmax": {"time_mixers": ["rad_rwkv7", "qwen2", "rad_rwkv6"], **BALANCED},
}
NUM_TOKENS = 70
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES_7B = {
    "vocab_size": 1024,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SIZES_DRY = SIZES_7B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

stacks = pytest.mark.parametrize("stack", STACKS)
head_sizes = pytest.mark.parametrize("head_dim", [64, 128])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def build(seed: int = 0, **config) -> RadladsForCausalLM:
    """A random model on the device; what starts at zero is moved away from it. Drawn there too, for speed."""
    torch.manual_seed(seed)
    with DEVICE:
        model = RadladsForCausalLM(RadladsConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." not in name and "embed" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def small_models(stack: str, head_dim: int, dtype: str) -> tuple[RadladsForCausalLM, RadladsForCausalLM]:
    """A model in fp32 and the same in `dtype`."""
    model = build(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        **STACKS[stack],
    )
    return model, copy.deepcopy(model).to(DTYPES[dtype])


def tokens(batch: int = 2, length: int = NUM_TOKENS, vocab_size: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def logits_of(model: RadladsForCausalLM, ids: torch.Tensor, precision: str | None = None) -> torch.Tensor:
    """Logits of one pass; precision: with the oracle behind such roundings instead of a backend."""
    with ExitStack() as stack, torch.no_grad():
        if precision is not None:
            stack.enter_context(mixers_call({kind: oracle(kind, precision) for kind in ("rwkv7", "gla")}))
        return model(ids, use_cache=False).logits.float()


def in_pieces(model: RadladsForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of passes over `sizes` tokens each that carry a cache."""
    cache, logits = RadladsCache(model.config), []
    with torch.no_grad():
        for piece in ids.split(sizes, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
    return torch.cat(logits, dim=1).float()


def precision_here(dtype: str) -> str:
    """What the automatic choice multiplies in."""
    return "bf16" if dtype == "bf16" else "exact"


@stacks
@head_sizes
@dtypes
@pytest.mark.parametrize("sizes", [[1] * NUM_TOKENS, [64, 1, 1, 4]], ids=["token_by_token", "prefill_and_decode"])
def test_decoding_is_prefill(stack, head_dim, dtype, sizes):
    """Both against the fp32 oracle and against each other."""
    (fp32, model), ids, precision = small_models(stack, head_dim, dtype), tokens(), precision_here(dtype)
    exact, whole, pieces = logits_of(fp32, ids, "exact"), logits_of(model, ids), in_pieces(model, ids, sizes)
    rounding = relative_error(logits_of(model, ids, precision), exact)
    errors = {
        "prefill": relative_error(whole, exact),
        "decode": relative_error(pieces, exact),
        "decode against prefill": relative_error(pieces, whole),
    }
    where = f"{stack}, N {head_dim}"
    assert_within_bounds(
        [Comparison("MODEL", f"{name}, {dtype}", where, precision, error, rounding) for name, error in errors.items()]
    )


@stacks
@dtypes
def test_left_padded_rows_are_single_rows(stack, dtype):
    (fp32, model), ids, precision = small_models(stack, 64, dtype), tokens(), precision_here(dtype)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits.float()[0, 5:]
    alone = ids[:1, 5:]
    single, exact = logits_of(model, alone)[0], logits_of(fp32, alone, "exact")[0]
    rounding = relative_error(logits_of(model, alone, precision)[0], exact)
    error = relative_error(padded, single)
    assert_within_bounds([Comparison("MODEL", f"padded rows, {dtype}", stack, precision, error, rounding)])


def loss_and_gradients(model: RadladsForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the next-token loss's gradient of every parameter, copied to where they are compared: the GPU."""
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    found = {"logits": outputs.logits.detach()}
    found |= {f"d {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.to(DEVICE, torch.float32, copy=True) for name, x in found.items()}


@torch.no_grad()
def make_queries_like_keys(model: RadladsForCausalLM) -> None:
    """Have every token read what it has just written. Where a head reads next to nothing, as a first token with a
    query at right angles to its key does, group norm blows rounding up, and one such head drowns all gradients."""
    for layer in model.model.layers:
        mixer = layer.self_attn
        for query, key in ((mixer.q_proj.weight, mixer.k_proj.weight), (mixer.q_proj.bias, mixer.k_proj.bias)):
            by_head = key.view(-1, mixer.head_dim, *key.shape[1:])
            query.mul_(0.5).add_(by_head.repeat_interleave(len(query) // len(key), dim=0).view_as(query))


@pytest.mark.parametrize(
    "stack",
    [{"time_mixers": ["rad_rwkv7", "rad_rwkv7"], **NORMED}, {"time_mixers": ["rad_rwkv6", "rad_rwkv7"], **BALANCED}],
    ids=["rwkv7-normed", "rwkv6-and-rwkv7-balanced"],
)
def test_two_layers_of_7b_shape_are_those_on_the_cpu(stack):
    """The CPU's side is fp32 on chunked torch. On the GPU: fp32 on chunked torch, then mixed bf16 as it comes."""
    sizes = SIZES_DRY if DRY_RUN else SIZES_7B
    model = build(num_hidden_layers=2, **sizes, **stack)
    make_queries_like_keys(model)
    ids = tokens(batch=2, length=65, vocab_size=1024)
    chunked = {kind: kernels(kind, "chunked") for kind in ("rwkv7", "gla")}
    with mixers_call(chunked):
        fp32 = loss_and_gradients(model, ids)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mixed = loss_and_gradients(model, ids)
        with mixers_call({kind: oracle(kind, "bf16") for kind in ("rwkv7", "gla")}):
            by_rounding = loss_and_gradients(model, ids)
    with mixers_call(chunked):
        on_cpu = loss_and_gradients(model.cpu(), ids.cpu())

    comparisons = []
    for name, expected in on_cpu.items():
        bound = "MODEL" if name == "logits" else "MODEL_GRADIENT"
        rounding = relative_error(by_rounding[name], expected)
        for mode, precision, found in (("fp32", "exact", fp32), ("mixed", "bf16", mixed)):
            error = relative_error(found[name], expected)
            comparisons.append(
                Comparison(bound, f"7B shape, {mode}", name, precision, error, 0.0 if mode == "fp32" else rounding)
            )
    assert_within_bounds(comparisons)
