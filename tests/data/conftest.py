"""Caches under a temporary folder, and small tokenizers."""

import datasets
import pytest

from hf_chts.data.embedded import embedded_tokenizer, train_byte_level_bpe


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_CHTS_CACHE", str(folder / "hf_chts"))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        # datasets reads the variable once, when it is imported
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="session")
def bpe(caches):
    """The embedded tokenizer with 512 tokens."""
    return embedded_tokenizer(512)


@pytest.fixture(scope="session")
def letters():
    """A tokenizer without merges: a token per byte, so blocks can be worked out by hand."""
    return train_byte_level_bpe([""], 257)
