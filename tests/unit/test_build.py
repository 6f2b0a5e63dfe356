"""Text to corpus: every document is there with its EOS, counts are the text's, and wrong input leaves nothing."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from radlads.data.binidx import BinIdxReader
from radlads.data.build import BuiltCorpus, build_binidx

EOS = 256
TEXTS = ["def f():\n    pass", "né ≠ e", "x"]


@pytest.fixture
def tokenizer():
    """One token for each byte, ids 0 .. 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build(tmp_path, tokenizer, texts=TEXTS, **limits):
    built = build_binidx(texts, tokenizer, tmp_path / "x", vocab_size=257, eos_token_id=EOS, **limits)
    return built, BinIdxReader(tmp_path / "x")


def decoded(reader, tokenizer):
    documents = [reader.document(i).tolist() for i in range(reader.num_documents)]
    assert all(ids[-1] == EOS for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


@pytest.mark.parametrize("batch_documents", [1, 2, 3, 256])
def test_documents_come_back(tmp_path, tokenizer, batch_documents):
    built, reader = build(tmp_path, tokenizer, iter(TEXTS), batch_documents=batch_documents)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert built == BuiltCorpus(num_tokens=num_bytes + 3, num_documents=3, num_bytes=num_bytes)
    assert (reader.num_tokens, reader.num_documents) == (built.num_tokens, 3)
    assert decoded(reader, tokenizer) == TEXTS


def test_limit_cuts_the_last_document(tmp_path, tokenizer):
    built, reader = build(tmp_path, tokenizer, ["abcdef", "ghijkl", "mno"], max_tokens=11)
    assert built == BuiltCorpus(num_tokens=11, num_documents=2, num_bytes=9)
    assert decoded(reader, tokenizer) == ["abcdef", "ghi"]


@pytest.mark.parametrize("max_tokens", [7, 8])
def test_limit_leaves_out_a_document_of_nothing_but_eos(tmp_path, tokenizer, max_tokens):
    built, reader = build(tmp_path, tokenizer, ["abcdef", "ghi"], max_tokens=max_tokens)
    assert built == BuiltCorpus(num_tokens=7, num_documents=1, num_bytes=6)
    assert decoded(reader, tokenizer) == ["abcdef"]


def test_limit_beyond_the_text_has_no_effect(tmp_path, tokenizer):
    assert build(tmp_path, tokenizer, max_tokens=1000)[0] == build(tmp_path, tokenizer)[0]


def test_limit_stops_reading(tmp_path, tokenizer):
    texts = iter(["abc"] * 10)
    build(tmp_path, tokenizer, texts, max_tokens=6, batch_documents=2)
    assert len(list(texts)) >= 6


def test_padding_and_truncation_of_the_tokenizer_are_ignored(tmp_path, tokenizer):
    tokenizer.enable_padding()
    tokenizer.enable_truncation(2)
    reader = build(tmp_path, tokenizer)[1]
    assert decoded(reader, tokenizer) == TEXTS
    assert tokenizer.padding and tokenizer.truncation


def test_no_special_tokens_are_added(tmp_path, tokenizer):
    tokenizer.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", tokenizer.token_to_id("a"))])
    assert decoded(build(tmp_path, tokenizer)[1], tokenizer) == TEXTS


@pytest.mark.parametrize(("vocab_size", "eos_token_id"), [(60, 0), (256, 256)])
def test_tokenizer_of_another_model_leaves_nothing(tmp_path, tokenizer, vocab_size, eos_token_id):
    with pytest.raises(ValueError, match=f"tokenizer and model do not match: .* vocabulary of {vocab_size}"):
        build_binidx(TEXTS, tokenizer, tmp_path / "x", vocab_size=vocab_size, eos_token_id=eos_token_id)
    assert list(tmp_path.iterdir()) == []


def test_no_document_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="would hold no tokens: add at least one document"):
        build(tmp_path, tokenizer, [])
    assert list(tmp_path.iterdir()) == []


def test_files_that_read_otherwise_than_written_are_removed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(BinIdxReader, "document", lambda self, i: self.tokens[:1])
    with pytest.raises(ValueError, match="what was written is not what is read"):
        build(tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("special", [True, False])
def test_a_literal_end_of_text_is_a_token_or_text_as_asked(tmp_path, tokenizer, special, processes):
    tokenizer.add_tokens([AddedToken("<|end|>", special=special, normalized=False)])
    assert tokenizer.token_to_id("<|end|>") == EOS
    reader = build(tmp_path, tokenizer, ["a<|end|>b"], processes=processes)[1]
    assert np.count_nonzero(reader.tokens == EOS) == 2 and reader.num_tokens == 4
    reader = build(tmp_path, tokenizer, ["a<|end|>b"], processes=processes, special_tokens_as_text=True)[1]
    assert decoded(reader, tokenizer) == ["a<|end|>b"] and np.count_nonzero(reader.tokens == EOS) == 1
    assert not tokenizer.encode_special_tokens, "the caller's tokenizer stays as it was"


def test_a_limit_cuts_a_literal_end_of_text_as_text(tmp_path, tokenizer):
    tokenizer.add_special_tokens(["<|end|>"])
    built, reader = build(tmp_path, tokenizer, ["a<|end|>b"], max_tokens=5, special_tokens_as_text=True)
    assert decoded(reader, tokenizer) == ["a<|e"] and built.num_bytes == 4
