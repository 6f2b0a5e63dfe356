"""An export in the hands of transformers' Trainer and pipeline, TRL, peft, accelerate, bitsandbytes and lm-eval.

Loaded as they load it, by trust_remote_code, from a stack of every kind of mixer.
"""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tolerances import PADDING, SPLIT, relative_error
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import is_bitsandbytes_available
from trl import SFTConfig, SFTTrainer

from radlads.checkpoint.hf_export import export
from radlads.model.configuration import RadladsConfig
from radlads.model.modeling import RadladsForCausalLM

MIXERS = ["rad_rwkv7", "qwen2", "rad_rwkv6"]
TEXTS = [f"text number {number} goes " + number % 4 * "on and " + "on" for number in range(6)]
IDS = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(0))
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    torch.manual_seed(0)
    config = RadladsConfig(**tiny.SIZES, time_mixers=MIXERS, groupnorm_att=True, balance_state=False)
    model = RadladsForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    out = tmp_path_factory.mktemp("exports") / "mixed"
    export(model, teacher, out)
    return out


@pytest.fixture
def load(folder):
    return lambda path=folder, **options: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, pad_token="<|end|>")


def logits_of(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs or {"input_ids": IDS}).logits


def trained(load, tokenizer, folder, collator, **changes):
    """A Trainer after three steps, and its losses: while training, and on the same texts afterwards."""
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokenizer(TEXTS)["input_ids"]])
    batches = {"max_steps": 3, "per_device_train_batch_size": 3, "per_device_eval_batch_size": len(TEXTS)}
    args = TrainingArguments(output_dir=str(folder), **QUIET | batches | changes)
    trainer = Trainer(load(), args, train_dataset=data, eval_dataset=data, data_collator=collator)
    return trainer, [trainer.train().training_loss, trainer.evaluate()["eval_loss"]]


FLATTENED = {
    "by positions": {},
    "by all that flash attention wants": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "without positions": {"return_position_ids": False, "return_seq_idx": True},
}


@pytest.mark.parametrize("options", FLATTENED.values(), ids=FLATTENED)
@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_learns_the_same_from_flattened_rows_as_from_padded_ones(load, tokenizer, tmp_path, options, recompute):
    _, padded = trained(load, tokenizer, tmp_path, DataCollatorForSeq2Seq(tokenizer))
    flat = DataCollatorWithFlattening(**options)
    _, flattened = trained(load, tokenizer, tmp_path, flat, gradient_checkpointing=recompute)
    assert flattened == pytest.approx(padded, rel=1e-4)


def test_what_trainer_saves_loads_with_its_code(load, tokenizer, tmp_path):
    trainer, _ = trained(load, tokenizer, tmp_path, DataCollatorForSeq2Seq(tokenizer))
    assert trainer.predict(trainer.eval_dataset).predictions.shape[::2] == (len(TEXTS), tiny.VOCAB)
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(logits_of(load(tmp_path / "saved")), logits_of(trainer.model))


def sft_losses(load, tokenizer, folder, **options):
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    batch = {"per_device_train_batch_size": len(TEXTS), "per_device_eval_batch_size": len(TEXTS), "max_steps": 2}
    # TRL's default is bf16, whose sums differ by more than the tolerance on some CPUs
    args = SFTConfig(output_dir=str(folder), bf16=False, **QUIET | batch | options)
    trainer = SFTTrainer(load(), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    return [trainer.evaluate()["eval_loss"], trainer.train().training_loss]


@pytest.mark.parametrize(
    "options", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}], ids=str
)
def test_trl_learns_the_same_from_packed_rows_as_from_padded_ones(load, tokenizer, tmp_path, options):
    assert sft_losses(load, tokenizer, tmp_path, **options) == pytest.approx(
        sft_losses(load, tokenizer, tmp_path), rel=1e-4
    )


def test_peft_trains_saves_and_merges_adapters(load, tmp_path):
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    adapted = logits_of(model)
    assert relative_error(adapted, logits_of(load())) > 0.01
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(), tmp_path / "adapter")), adapted)
    merged = model.merge_and_unload()
    assert relative_error(logits_of(merged), adapted) < SPLIT
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(merged))


def test_layers_that_accelerate_keeps_on_disk_compute_the_same(load, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    model = load(device_map=places, offload_folder=tmp_path)
    assert torch.equal(logits_of(model), logits_of(load()))
    assert torch.equal(*(each.generate(IDS, max_new_tokens=3, do_sample=False) for each in (model, load())))


def test_pipelines_generate_what_the_model_does(load, folder, tokenizer):
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    (answer,) = generate("ab", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = tokenizer("ab", return_tensors="pt").input_ids
    expected = load().generate(ids, max_new_tokens=4, do_sample=False)[0, 2:]
    assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_lm_eval_scores_a_folder_of_type_hf(load, folder, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2, dtype="float32")
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate([("abc", " de"), ("a longer", " f")])]
    (score, _), _ = model.loglikelihood(requests, disable_tqdm=True)
    ids = torch.tensor([tokenizer("abc de").input_ids])
    log_p = logits_of(load(), input_ids=ids)[0].log_softmax(-1)
    expected = sum(log_p[n - 1, ids[0, n]].item() for n in range(3, 6))
    assert score == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_bitsandbytes_weights_generate_and_take_adapters(load, bits):
    model = load(quantization_config=BitsAndBytesConfig(**{bits: True}), device_map="cpu", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() == pytest.approx(load()(IDS, labels=IDS).loss.item(), rel=0.1)
    assert all(weights.grad is not None for name, weights in model.named_parameters() if "lora" in name)


def test_a_larger_embedding_survives_saving(load, tmp_path):
    model = load()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[299, 1], [2, 280]])
    assert torch.equal(logits_of(load(tmp_path), input_ids=ids), logits_of(model, input_ids=ids))


def test_the_stack_without_its_head_is_an_automodel(load, folder):
    stack = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        hidden = stack(IDS).last_hidden_state
        assert torch.equal(hidden, load()(IDS, output_hidden_states=True).hidden_states[-1])


def test_losses_are_divided_by_the_tokens_that_trainer_counts(load):
    labels = IDS.clone()
    labels[0, :4] = -100
    mean = load()(IDS, labels=labels).loss
    shared = load()(IDS, labels=labels, num_items_in_batch=torch.tensor(26)).loss
    assert shared.item() == pytest.approx(mean.item() * (labels[:, 1:] != -100).sum().item() / 26, rel=1e-6)


def test_embeddings_half_precision_and_right_padding(load):
    model = load()
    embedded = model.get_input_embeddings()(IDS)
    assert torch.equal(logits_of(model, inputs_embeds=embedded), logits_of(model))
    mask = torch.ones_like(IDS)
    mask[0, 5:] = 0
    padded = logits_of(model, input_ids=IDS, attention_mask=mask)[:1, :5]
    assert relative_error(padded, logits_of(model, input_ids=IDS[:1, :5])) < PADDING
    assert relative_error(logits_of(load().bfloat16()).float(), logits_of(model)) < 0.05
    assert relative_error(logits_of(load().half()).float(), logits_of(model)) < 0.01
