"""The data to train on: fields of a run's YAML file and of its command line."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Packing = Literal["packed", "truncate_and_pad"]
OnBadDocument = Literal["error", "skip"]


@dataclass
class DataArguments:
    """Parameters that control the corpus, the tokenizer and how documents become blocks of tokens.

    Raises:
        ValueError: a field has a value outside its range; the message names the field and the value.
    """

    _argument_group_name = "the data"  # HfArgumentParser reads it

    # --- corpus ---
    dataset: str = field(
        default="embedded",
        metadata={
            "help": "What to train on. 'embedded' (default): the Python standard library's own source files, "
            "no network needed. Otherwise the id of a dataset on the Hub, or a local file or folder "
            "(.txt, .json, .jsonl, .csv, .tsv, .parquet, .arrow, WebDataset's .tar, also .gz, .bz2, .xz and .zst; in a "
            "folder, files or sub-folders called train, validation and test are splits, and so are files named as on "
            "the Hub, train-00000-of-00080.parquet; also a clone of a Hub dataset, and what save_to_disk wrote), or a "
            "directory that `hf-chts prepare` wrote."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a Hub dataset, such as 'en' for allenai/c4; of a local folder, its sub-folder of "
            "that name if it has one. Default: its own."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on. Default: 'train'."})
    text_column: str = field(default="text", metadata={"help": "Column that holds a document's text. Default: 'text'."})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read, shuffle and tokenize documents while training, instead of preparing all blocks on disk "
            "first. Needs max_steps; dataloader_num_workers processes do it. Default: false."
        },
    )
    shuffle_buffer: int = field(
        default=10_000,
        metadata={
            "help": "When streaming, shuffle the order of the files, and documents within windows of this many (or of "
            "32 Mi characters) of each rank's each dataloader worker; 0: the corpus's own order. Default: 10,000 "
            "documents."
        },
    )

    on_bad_document: OnBadDocument | None = field(
        default=None,
        metadata={
            "help": "What to do with a document that is damaged (bytes that are not UTF-8, lone surrogates, lines that "
            "are not JSON), has no text in text_column, or has no such column: 'error' or 'skip'; rows of null or "
            "empty text are always left out. Default: 'error' for documents that are read before training starts; a "
            "stream skips them with a warning and counts them in the log, until they are more than ten and more than "
            "one in a hundred of the documents that a reader has read."
        },
    )

    # --- tokens ---
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "'embedded': a byte-level BPE with the model's vocabulary size, trained on the embedded corpus and "
            "cached. Otherwise a directory or a Hub id. Default: the model's own with init: weights, else 'embedded'."
        },
    )
    block_size: int = field(default=256, metadata={"help": "Length of a training sequence, in tokens. Default: 256."})
    packing: Packing = field(
        default="packed",
        metadata={
            "help": "'packed' (default): documents end to end with an EOS after each, cut into full blocks. "
            "'truncate_and_pad' (the paper's): one document a block, cut at block_size or padded up to it."
        },
    )

    # --- validation ---
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to validate on. Default: none, so documents are held out of the training split; "
            "'embedded' always has its own."
        },
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the documents held out, without validation_split: by a hash of each text and the seed, "
            "so that equal ones stay together. Default: 0.05, the paper's."
        },
    )
    max_eval_tokens: int | None = field(
        default=10_000_000,
        metadata={"help": "Evaluate on at most this many tokens, padding included; null for all. Default: 10,000,000."},
    )

    def __post_init__(self) -> None:
        # YAML reads 5e-2 as a string
        try:
            self.validation_fraction = float(self.validation_fraction)
        except (TypeError, ValueError):
            raise ValueError(f"validation_fraction={self.validation_fraction!r} is not a number.") from None
        if not 0 < self.validation_fraction < 1 and not (self.validation_fraction == 0 and self.validation_split):
            raise ValueError(
                f"validation_fraction={self.validation_fraction} has to lie between 0 and 1, both excluded; to train "
                "on all documents name a validation_split."
            )
        self._check_whole("block_size", 2)
        self._check_whole("shuffle_buffer", 0)
        if self.max_eval_tokens is not None:
            self._check_whole("max_eval_tokens", self.block_size)
        if self.packing not in get_args(Packing):
            raise ValueError(f"packing={self.packing!r} has to be one of {', '.join(get_args(Packing))}.")
        if self.on_bad_document not in (None, *get_args(OnBadDocument)):
            raise ValueError(f"on_bad_document={self.on_bad_document!r} has to be error or skip, or null.")

    def _check_whole(self, name: str, smallest: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ValueError(f"{name}={value!r} has to be a whole number of at least {smallest}.")
