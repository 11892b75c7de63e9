"""`train --init weights`: a run that starts with the weights of a model, sparse or dense, instead of random ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_chts import SparseTrainingArguments, SparsityConfig, SparsityHandle, sparsify
from hf_chts.config import CONFIG_NAME
from hf_chts.config_file import PRESETS_ROOT, find
from hf_chts.data import LoadedData, load_tokenizer
from hf_chts.data.tokenizer import tokenizer_digest
from hf_chts.evaluation.untrained import batches, language_modeling_of
from hf_chts.export.starting_weights import file_of, load_weights, weights_digest
from hf_chts.files.atomic import finite_or_null, write_json
from hf_chts.files.reading import read_json
from hf_chts.layers.calibration import input_norms
from hf_chts.layers.shares import refuse_other_sparsity
from hf_chts.layers.targets import find_targets
from hf_chts.model_arguments import ModelArguments
from hf_chts.model_checks import check_positions
from hf_chts.names import listed
from hf_chts.sharding.ranks import rank_and_world, together
from hf_chts.topology.parts import INITIAL_TOPOLOGIES

RESULTS_NAME = "start_results.json"
# Fields of the config that say which layers have links, and how many each
_LAYERS = ("target_modules", "exclude_modules", "allocation", "layer_sparsity", "per_head")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class StartingModel:
    """The model that a run starts with.

    Attributes:
        name: a directory or a Hub id.
        sparsity: the config of the run.
        exported: the sparsity config of the model, if it is sparse.
        results: loss, perplexity and bits per byte on the validation split by when they were measured, such as "before
            pruning"; in order.
    """

    name: str
    sparsity: SparsityConfig
    exported: SparsityConfig | None
    results: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, args: ModelArguments, sparsity: SparsityConfig) -> "StartingModel | None":
        """What `args` name; None for random weights.

        Raises:
            ValueError, OSError: it has no weights that this run could start with.
        """
        if args.init != "weights":
            return None
        if sparsity.initial_weights != "model":
            raise ValueError(
                f"initial_weights is {sparsity.initial_weights!r}, which would overwrite the weights of {args.model!r} "
                "that init: weights asks for: leave one of them out"
            )
        name = find(args.model, PRESETS_ROOT)
        if name.endswith(".json"):
            raise ValueError(
                f"init is 'weights', and model {args.model!r} is a config file without any: name the directory of a "
                "model or a Hub id, or leave init out"
            )
        path = file_of(name, CONFIG_NAME)
        exported = None if path is None else SparsityConfig.load(path)
        start = cls(name, sparsity, exported if exported is not None and not exported.is_dense else None)
        if start.keeps_topology:
            start._refuse_other_layers()
        start._refuse_other_activations()
        return start

    @property
    def keeps_topology(self) -> bool:
        """Whether the run goes on with the links of the model; else they are chosen anew, or it is dense."""
        chosen = "weight" in INITIAL_TOPOLOGIES[self.sparsity.initial_topology].needs
        return self.exported is not None and not self.sparsity.is_dense and not chosen

    @property
    def facts(self) -> dict[str, str]:
        """Entries of model cards."""
        found = {when: f"{figures['bits_per_byte']:.4f}" for when, figures in self.results.items()}
        return {"starting weights": self.name, **{f"bits per byte {when}": figure for when, figure in found.items()}}

    def _refuse_other_layers(self) -> None:
        assert self.exported is not None
        for name in _LAYERS:
            there, here = getattr(self.exported, name), getattr(self.sparsity, name)
            if there != here:
                raise ValueError(
                    f"{self.name} is sparse with {name} {there!r}, and this run has {here!r}: set {name} as there to "
                    "go on with its topology, or initial_topology: magnitude to choose links anew by its weights"
                )

    def _refuse_other_activations(self) -> None:
        there = 1.0 if self.exported is None else self.exported.activation_topk
        here = self.sparsity.activation_topk
        if there < 1 and here != there:
            remedy = "choose a sparse method" if self.sparsity.is_dense else f"set activation_topk: {there:g}, as there"
            raise ValueError(
                f"of {self.name} only the largest activations stay (activation_topk {there:g}), and in this run "
                f"{'all' if here == 1 else f'the share {here:g}'}, so that its weights would compute something else: "
                f"{remedy}"
            )

    def tokenizer(self, given: str | None, vocab_size: int) -> str:
        """The name of the tokenizer to train with: the model's own.

        Args:
            given: the tokenizer that the user asked for.

        Raises:
            ValueError: it is another one, or the model has none and the user has not named it.
        """
        if not any(file_of(self.name, name) for name in _TOKENIZER_FILES):
            if given is None:
                raise ValueError(
                    f"{self.name} has no tokenizer: name the one that it was trained with, with --tokenizer"
                )
            return given  # load_data refuses one with more tokens
        if given is not None:
            asked, own = (tokenizer_digest(load_tokenizer(name, vocab_size)) for name in (given, self.name))
            if asked != own:
                raise ValueError(
                    f"tokenizer {given!r} does not give the token ids that {self.name} was trained with: leave "
                    "tokenizer out, so that the model's own is taken"
                )
        return self.name

    def make(
        self,
        model_args: ModelArguments,
        data: LoadedData,
        byte_lengths: Tensor,
        args: SparseTrainingArguments,
        block_size: int,
    ) -> tuple[PreTrainedModel, SparsityHandle | None, str]:
        """The model to train, its handle if it is sparse, and a digest of its weights as they came. Collective.

        The model is measured on the validation split before it is pruned and after, unless a run is resumed.

        Args:
            block_size: tokens of a training sequence.

        Raises:
            ValueError, OSError: it cannot be loaded, or not be trained so.
        """
        with args.main_process_first(desc="loading the weights"):
            model = self._load(model_args)
        check_positions(model, block_size)
        _give_missing_ids(model, data)
        digest = weights_digest(model)
        resumes = str(args.resume_from_checkpoint or "false").lower() != "false"

        def measure(when: str) -> None:
            if resumes:
                return
            with _on_device(model, args.device):
                dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
                size = args.per_device_eval_batch_size
                found = language_modeling_of(model, data.validation, byte_lengths, batch_size=size, dtype=dtype)
            self.results[when] = found
            line = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
            _say(f"{when + ':':<17} {line}, bits per byte {found['bits_per_byte']:.4f}")

        kept = SparsityHandle.of(model)
        if resumes:
            path = Path(str(args.output_dir)) / RESULTS_NAME
            self.results = read_json(path) if path.is_file() else {}
        if kept is not None or self.sparsity.is_dense:
            what = f"its topology, {kept.sparsity():.2%} sparse" if kept is not None else "all weights trained"
            others = () if self.exported is None or self.sparsity.also_sparse else self.exported.also_sparse
            if others:
                what += f"; the zeros of its {listed(others)} (also_sparse) are not kept"
            _say(f"Starting with the weights of {self.name}, {what}")
            measure("before training")
            return model, kept, digest
        self._say_how_it_is_pruned()
        measure("before pruning")
        sparse = self._prune(model, data, args, model_args.calibration_blocks)
        measure("after pruning")
        return model, sparse, digest

    def _load(self, args: ModelArguments) -> PreTrainedModel:
        model = load_weights(
            self.name,
            sparse=self.exported is not None,
            sparsity=self.sparsity if self.keeps_topology else None,
            attn_implementation=args.attn_implementation,
        )
        sparse = SparsityHandle.of(model)
        if sparse is not None:
            refuse_other_sparsity(self.name, sparse.layers, self.sparsity)
        return model

    def _say_how_it_is_pruned(self) -> None:
        config = self.sparsity
        begins = f"{config.initial_sparsity:.2%} by {config.initial_topology}, {config.allocation}"
        _say(f"Starting with the weights of {self.name}, pruned to {begins}")
        if "weight" not in INITIAL_TOPOLOGIES[config.initial_topology].needs and config.initial_sparsity > 0:
            by_weights = [name for name, part in INITIAL_TOPOLOGIES.items() if "weight" in part.needs]
            _say(f"This topology takes no account of the weights; {', '.join(by_weights)} do (initial_topology)")

    def _prune(
        self, model: PreTrainedModel, data: LoadedData, args: SparseTrainingArguments, blocks: int
    ) -> SparsityHandle:
        norms, problem = None, None
        if "input_norms" in INITIAL_TOPOLOGIES[self.sparsity.initial_topology].needs:
            if rank_and_world()[0] == 0:
                try:
                    with _on_device(model, args.device):
                        norms = self._input_norms(model, data, blocks, args.per_device_eval_batch_size)
                except ValueError as error:
                    problem = error
            norms = together({}, problem, norms)  # the same on all ranks, to the last bit
        return sparsify(model, self.sparsity, calibration=norms)

    def _input_norms(self, model: PreTrainedModel, data: LoadedData, blocks: int, size: int) -> dict[str, Tensor]:
        train: Any = data.train
        if hasattr(train, "__len__"):
            step = max(1, len(train) // blocks)
            chosen = range(0, min(len(train), step * blocks), step)  # from all over the data
        else:
            train = list(islice(iter(train), blocks))
            chosen = range(len(train))
        if not chosen:
            raise ValueError("there is no training data to calibrate with")
        targets = find_targets(model, self.sparsity)
        _say(f"{self.sparsity.initial_topology}: inputs of {len(targets)} layers over {len(chosen)} training sequences")
        inputs = (
            {name: value for name, value in batch.items() if name != "labels"}
            for batch in batches(train, chosen, size, model.device)
        )
        return input_norms(model, targets, inputs)


class KeepsResults(TrainerCallback):
    """Writes what was measured before training into the folder of a run, as the run begins."""

    def __init__(self, start: StartingModel) -> None:
        self.results = start.results

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and args.should_save:
            write_json(Path(args.output_dir) / RESULTS_NAME, finite_or_null(self.results))


def _give_missing_ids(model: PreTrainedModel, data: LoadedData) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, getattr(data.tokenizer, name))


@contextmanager
def _on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """The model on a device for a while."""
    home = model.device
    model.to(device)  # type: ignore[arg-type] # decorated in transformers
    try:
        yield
    finally:
        model.to(home)  # type: ignore[arg-type]


def _say(line: str) -> None:
    if rank_and_world()[0] == 0:
        print(line, flush=True)
