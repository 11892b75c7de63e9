import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_chts.data import embedded_documents, token_byte_lengths

TEXTS = [
    "def f(x):\n    return x ** 2\n",
    "Grüße, naïve café — “quotes” … 漢字かな 🙂👩‍👩‍👧 \u0000\x7f\r\n\t",
    "Ġ Ċ ▁ <0x0A> are ordinary text here",
]


def test_byte_level(bpe):
    lengths = token_byte_lengths(bpe, 512)
    for text in [*TEXTS, *(document.text for document in embedded_documents("test")[:10])]:
        assert lengths[bpe(text, verbose=False)["input_ids"]].sum() == len(text.encode())


def test_shape_and_special_tokens(bpe):
    lengths = token_byte_lengths(bpe, 600)
    assert lengths.shape == (600,)
    assert lengths.dtype == torch.long
    assert lengths[bpe.eos_token_id] == 0
    assert (lengths[512:] == 0).all()
    assert (lengths[1:512] >= 1).all()
    assert lengths[bpe.get_vocab()["Ġself"]] == 5


def test_added_tokens(letters, tmp_path):
    letters.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.add_tokens(["naïve"])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<turn>", special=True)]})
    tokenizer.add_tokens([AddedToken("<hidden>", special=True)])
    lengths = token_byte_lengths(tokenizer, 300)
    assert lengths[tokenizer.convert_tokens_to_ids("<hidden>")] == 0
    assert lengths[tokenizer.convert_tokens_to_ids("naïve")] == 6
    assert lengths[tokenizer.convert_tokens_to_ids("<turn>")] == 0
    text = "a naïve 🙂"
    assert lengths[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_byte_level_without_all_bytes():
    expected = {"<|end|>": 0, "a": 1, "Ġa": 2, "Ã©": 2}
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(expected)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    assert token_byte_lengths(tokenizer, len(expected)).tolist() == list(expected.values())


def test_sentencepiece_vocabulary():
    expected = {"<unk>": 0, "<s>": 0, "</s>": 0, "<0x0A>": 1, "<0xF0>": 1, "▁": 1, "▁the": 4, "é": 2, "▁▁漢": 5}
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(expected)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert token_byte_lengths(tokenizer, len(expected)).tolist() == list(expected.values())


def test_vocabulary_larger_than_the_models(bpe):
    with pytest.raises(ValueError, match=r"511.*vocab_size=500.*512"):
        token_byte_lengths(bpe, 500)
