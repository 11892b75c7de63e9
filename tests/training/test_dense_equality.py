"""A table of argument sets. In each, a dense SparseTrainer equals `Trainer` bit for bit, and a sparse run keeps its
invariants; sets that do not concern training, such as those of logs, do not change a sparse run.

Compared are logs without times, weights, the values that training, evaluation and prediction return, the files that are
written, and errors. A new set is a new row.
"""

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Stop, arguments
from datasets import Dataset
from tiny import VOCABULARY, random_blocks, tiny_llama
from torch.utils.data import IterableDataset
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from hf_chts import SparseTrainer, SparsityConfig

STEPS = 8
# What we leave behind beside the Trainer's own; a dense run has the seals of its checkpoints, and whose its folder is
OUR_FILES = {"checkpoint_seal.json", "run_identity.json", "training.lock"}
OUR_SPARSE_FILES = {"masks.safetensors", "sparsity_config.json", "topology_history.json"}
TIMES = ("_runtime", "_per_second", "_preparation_time", "topology_seconds")


DENSE = SparsityConfig(method="dense")


class Unsized(IterableDataset):
    """Blocks that nobody knows the number of."""

    def __init__(self, count=24):
        self.blocks = random_blocks(count, 8)

    def __iter__(self):
        return iter(self.blocks.with_format("torch"))


class Commands(TrainerCallback):
    """Asks for what no interval asks for."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == 3
        control.should_evaluate |= state.global_step == 5
        control.should_log |= state.global_step == 5

    def on_epoch_begin(self, args, state, control, **kwargs):
        return control


class NotANumber(TrainerCallback):
    """A weight becomes NaN after some steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            with torch.no_grad():
                next(model.parameters()).fill_(math.nan)


class TooLarge(TrainerCallback):
    """Memory that holds batches of two."""

    def __init__(self, step):
        self.step, self.largest = step, 2

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(model, "is_small", False):
            return

        def refuse(module, positional, inputs):
            if len(inputs["input_ids"]) > self.largest and state.global_step >= self.step and module.training:
                raise RuntimeError("CUDA out of memory.")

        model.is_small = True
        model.register_forward_pre_hook(refuse, with_kwargs=True)


def right_answers(prediction, compute_result=True):
    logits, labels = (torch.as_tensor(np.asarray(part)) for part in (prediction.predictions, prediction.label_ids))
    return {"right": float((logits.argmax(-1)[:, :-1] == labels[:, 1:]).float().mean()), "seen": len(labels)}


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def lengths():
    """Blocks of different lengths, and of a column that the model does not take."""
    rows = random_blocks(24, 8)["input_ids"]
    rows = [row[: 3 + i % 5] for i, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "place": list(range(24))})


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Case:
    """An argument set.

    Attributes:
        args: changes of the base arguments.
        made: called for each run, further arguments of the Trainer: nothing that runs share may be changed by one.
        do: what is done with the Trainer, in place of `train()`; what it returns is compared.
        error: what ends the run.
        neutral: a sparse run ends with the weights and masks of the base case: the set does not touch training.
    """

    args: dict[str, Any] = field(default_factory=dict)
    made: Callable[[], dict[str, Any]] = dict
    do: Callable[[Trainer], Any] = lambda run: run.train()
    error: type[Exception] | None = None
    neutral: bool = False


def resume(how, **changes):
    """Train, and train once more with a fresh Trainer from a checkpoint in the middle."""

    def do(run):
        run.train()
        if how == "true by position":
            shutil.rmtree(Path(run.args.output_dir) / f"checkpoint-{STEPS}")
        again = fresh(run, **changes)
        checkpoint = Path(run.args.output_dir) / "checkpoint-4"
        calls = {
            "text": lambda: again.train(resume_from_checkpoint=str(checkpoint)),
            "position": lambda: again.train(str(checkpoint), None, ["past_key_values"]),
            "path": lambda: again.train(resume_from_checkpoint=checkpoint),
            "true by position": lambda: again.train(True),
            "end": lambda: again.train(resume_from_checkpoint=str(checkpoint.with_name(f"checkpoint-{STEPS}"))),
            "nowhere": lambda: again.train(resume_from_checkpoint=str(checkpoint / "nowhere")),
        }
        return calls[how]()

    return do


def fresh(run, **changes):
    """Another Trainer as `run` was made; `run` stands for it from here on."""
    args, made, kind = run.recipe
    again = make(kind, args | changes, made, run.sparsity_of)
    run.latest = again
    return again


def predicted(data):
    def do(run):
        run.train()
        output = run.predict(data())
        return output.predictions, output.label_ids, output.metrics, run.evaluate(data())

    return do


def trained_twice(run):
    return run.train(), run.train()


def saved(run):
    metrics = run.train().metrics
    run.save_model()
    run.save_model(str(Path(run.args.output_dir) / "elsewhere"))
    run.save_state()
    run.log_metrics("train", {"loss": 1.0})
    run.save_metrics("train", {"mean": metrics["train_loss"]})


def without(kind):
    def do(run):
        run.remove_callback(kind)
        run.add_callback(Stop(7))
        assert run.pop_callback(Stop).step == 7
        return run.train()

    return do


def added_later(run):
    run.add_callback(Commands)
    run.add_callback(PrinterCallback())
    run.add_callback(Stop(6))
    return run.train()


def own_optimizer():
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {"model": model, "optimizers": (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))}


# its old name is deprecated where it has a new one
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
BEST = EVALUATED | {"load_best_model_at_end": True, "save_steps": 2}


def early():
    return {"callbacks": [EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1e6)]}


def metrics():
    return {"compute_metrics": right_answers}


CASES = {
    "base": Case(neutral=True),
    # how long
    "a part of an epoch": Case({"max_steps": -1, "num_train_epochs": 1.34}),
    "accumulation, epochs that it does not divide": Case(
        {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 3}
    ),
    # the optimizer
    "a schedule with arguments": Case(
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 2}
    ),
    "schedule reduce_lr_on_plateau": Case(
        EVALUATED | {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    ),
    "Adafactor": Case({"optim": "adafactor"}),
    "optimizer and schedule of the user's": Case(made=own_optimizer, do=resume("text")),
    "optimizer by its class": Case(
        made=lambda: {"optimizer_cls_and_kwargs": (torch.optim.Adam, {"lr": 0.01, "betas": (0.5, 0.9)})}
    ),
    "no clipping": Case({"max_grad_norm": 0}),
    # the loss
    "label smoothing": Case({"label_smoothing_factor": 0.1}),
    "a loss of the user's": Case(made=lambda: {"compute_loss_func": summed_loss}),
    "noise on embeddings": Case({"neftune_noise_alpha": 5.0}),
    "bf16": Case({"bf16": True} | EVALUATED),
    "bf16 in evaluation": Case({"bf16_full_eval": True}, do=predicted(lambda: random_blocks(6, 8))),
    "gradient checkpointing": Case({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}),
    "compiled": Case(EVALUATED | {"torch_compile": True, "torch_compile_backend": "eager"}),
    # the data
    "another order": Case({"data_seed": 7}),
    "grouped by length": Case(
        {"train_sampling_strategy": "group_by_length"},
        lambda: {"train_dataset": lengths(), "eval_dataset": lengths(), "data_collator": padded},
    ),
    "all columns": Case(
        {"remove_unused_columns": False},
        lambda: {"train_dataset": lengths(), "eval_dataset": lengths(), "data_collator": padded},
    ),
    "iterable data": Case(EVALUATED, lambda: {"train_dataset": Unsized(40)}),
    "iterable data that end early": Case({}, lambda: {"train_dataset": Unsized(10)}),
    "iterable data of datasets, resumed": Case(
        made=lambda: {"train_dataset": random_blocks(40, 8).to_iterable_dataset()}, do=resume("text")
    ),
    "no data": Case(made=lambda: {"train_dataset": None}, error=ValueError),
    # logs
    "logs now and then": Case({"logging_steps": 3, "logging_first_step": True}, neutral=True),
    "no logs": Case({"logging_strategy": "no"}, neutral=True),
    "bars": Case(EVALUATED | {"disable_tqdm": False}, neutral=True),
    "tokens counted, resumed": Case({"include_num_input_tokens_seen": "non_padding"}, do=resume("text"), neutral=True),
    "NaN not filtered": Case({"logging_nan_inf_filter": False}, neutral=True),
    # evaluation
    "evaluation from the start": Case(EVALUATED | {"eval_on_start": True, "eval_delay": 4}, neutral=True),
    "evaluation of several sets": Case(
        EVALUATED,
        lambda: {"eval_dataset": {"a": random_blocks(6, 8), "b": random_blocks(4, 8)}, **metrics()},
        neutral=True,
    ),
    "evaluation in batches": Case(
        EVALUATED | {"batch_eval_metrics": True, "per_device_eval_batch_size": 3}, metrics, neutral=True
    ),
    "losses only": Case(
        EVALUATED | {"prediction_loss_only": True}, metrics, predicted(lambda: random_blocks(6, 8)), neutral=True
    ),
    "prediction": Case(made=metrics, do=predicted(lambda: random_blocks(6, 8)), neutral=True),
    "prediction without a length": Case(made=metrics, do=predicted(lambda: Unsized(6)), neutral=True),
    "evaluation without a length": Case(EVALUATED, lambda: {"eval_dataset": Unsized(6)}, neutral=True),
    # checkpoints
    "nothing saved": Case({"save_strategy": "no"}, neutral=True),
    "saved by the epoch": Case({"save_strategy": "epoch", "save_total_limit": 1}, do=saved, neutral=True),
    "models only": Case({"save_only_model": True, "save_steps": 2, "save_total_limit": 2}, neutral=True),
    "the best by a figure of the user's": Case(
        BEST | {"metric_for_best_model": "right", "greater_is_better": True, "save_total_limit": 1}, metrics
    ),
    "the best alone saved": Case(
        BEST | {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": False}
    ),
    "resumed, by position": Case(do=resume("position"), neutral=True),
    "resumed, by a Path": Case(do=resume("path"), neutral=True),
    "resumed from the last, by position": Case(do=resume("true by position"), neutral=True),
    "resumed with the best": Case(BEST, do=resume("text")),
    "resumed, data from the beginning": Case(do=resume("text", ignore_data_skip=True)),
    "resumed with accumulation": Case({"gradient_accumulation_steps": 2}, do=resume("text")),
    "resumed with callbacks": Case(BEST | {"restore_callback_states_from_checkpoint": True}, early, resume("text")),
    "resumed from the last where there is none": Case(
        do=lambda run: run.train(resume_from_checkpoint=True), error=ValueError
    ),
    "not resumed": Case(do=lambda run: run.train(resume_from_checkpoint=False), neutral=True),
    # callbacks
    "stopped by a callback": Case(made=lambda: {"callbacks": [Stop(5)]}),
    "a callback that commands": Case(made=lambda: {"callbacks": [Commands]}, neutral=True),
    "bars removed": Case({"disable_tqdm": False}, do=without(ProgressCallback), neutral=True),
    "printer given": Case(made=lambda: {"callbacks": [PrinterCallback]}, neutral=True),
    "callbacks added later": Case(do=added_later),
    # the rest
    "a batch too large in the middle": Case({"auto_find_batch_size": True}, lambda: {"callbacks": [TooLarge(3)]}),
    "model_init": Case(made=lambda: {"model": None, "model_init": lambda: tiny_llama()}, do=trained_twice),
    "arguments of train by name": Case(
        EVALUATED,
        do=lambda run: run.train(trial=None, ignore_keys_for_eval=["past_key_values"], resume_from_checkpoint=None),
        neutral=True,
    ),
    "trained twice": Case(do=trained_twice),
    "saved by hand": Case(do=saved, neutral=True),
}


def make(kind, args, made, sparsity):
    """A Trainer of this class on fresh data and a fresh model."""
    options = {"train_dataset": random_blocks(24, 8), "eval_dataset": random_blocks(6, 8)} | made()
    if "model" not in options:
        options["model"] = tiny_llama()
    if kind is SparseTrainer:
        options["sparsity"] = sparsity
    run = kind(args=arguments(kind=TrainingArguments, **args), **options)
    run.recipe, run.sparsity_of, run.latest = (args, made, kind), sparsity, run
    return run


def outcome(directory, case, kind, sparsity=None):
    """What is left of a run, in terms that can be compared."""
    args = {"directory": directory, "max_steps": STEPS, "save_steps": 4} | copy.deepcopy(case.args)
    torch._dynamo.reset()  # what an earlier run compiled may be used for this one, and adds up in another order
    error, returned, run = None, None, None
    try:
        run = make(kind, args, case.made, sparsity)
        returned = case.do(run)
    except Exception as raised:
        error = raised
    if error is not None and case.error is None:
        raise error
    result = {"error": type(error), "returned": plain(returned)}
    if run is not None:
        state = run.latest.state
        result |= {
            "log": [plain(entry) for entry in state.log_history],
            "state": plain([state.global_step, state.epoch, state.best_metric, state.best_global_step,
                            state.total_flos, state.num_input_tokens_seen, state.train_batch_size]),
            "weights": {name: value.clone() for name, value in run.latest.model.state_dict().items()},
        }  # fmt: skip
        if kind is SparseTrainer:
            result["masks"] = {name: mask.clone() for name, mask in run.latest.sparse.masks().items()}
            result["updates"] = plain(run.latest.evolver.history) if run.latest.evolver else []
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    result["files"] = {str(path.relative_to(directory)) for path in files}
    result["contents"] = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix in (".safetensors", ".pt", ".pth") or path.name.endswith("config.json")
    }
    result["states"] = [
        plain(json.loads(path.read_text())["log_history"])
        for path in sorted(Path(directory).rglob("trainer_state.json"))
    ]
    return result


def plain(value):
    """Without times and without NaN, which is not equal to itself."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not key.endswith(TIMES)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return [value.shape, str(value.dtype), value.tobytes()]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def same(first, second, *, but=()):
    """That two outcomes are equal in all but these parts; the first that is not is named."""
    assert first.keys() - set(but) == second.keys() - set(but)
    for part in first.keys() - {"weights", "masks", *but}:
        assert first[part] == second[part], part
    for part in {"weights", "masks"} & first.keys() - set(but):
        assert first[part].keys() == second[part].keys(), part
        for name, tensor in first[part].items():
            # not torch.equal: with a NaN that is never so
            assert tensor.view(torch.uint8).equal(second[part][name].view(torch.uint8)), (part, name)


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_dense_is_the_plain_trainer_in(tmp_path, name):
    case = CASES[name]
    plainly = outcome(tmp_path / "plain", case, Trainer)
    ours = outcome(tmp_path / "ours", case, SparseTrainer, DENSE)
    assert not ours.pop("masks", None)
    assert not ours.pop("updates", None)
    assert issubclass(plainly["error"], case.error or type(None))
    same(plainly, ours, but=("files",))
    assert {file for file in ours["files"] if Path(file).name not in OUR_FILES} == plainly["files"]
    checkpoints = {str(Path(file).parent) for file in plainly["files"] if "checkpoint-" in file}
    added = ours["files"] - plainly["files"] - {"run_identity.json", "training.lock"}
    assert {f"{checkpoint}/checkpoint_seal.json" for checkpoint in checkpoints} == added


@pytest.mark.parametrize("filtered", [True, False])
def test_a_nan_ends_our_runs_where_the_plain_trainer_trains_on(tmp_path, filtered):
    case = Case({"logging_nan_inf_filter": filtered}, lambda: {"callbacks": [NotANumber]}, error=FloatingPointError)
    plainly = outcome(tmp_path / "plain", case, Trainer)
    ours = outcome(tmp_path / "ours", case, SparseTrainer, DENSE)
    assert plainly["error"] is type(None)
    assert plainly["state"][0] == STEPS
    assert ours["error"] is FloatingPointError
    assert ours["state"][0] == 5  # the step that meets the NaN is not taken
    assert ours["log"] == plainly["log"][:5]
    assert {file.split("/")[0] for file in ours["files"]} - OUR_FILES == {"checkpoint-4"}
    assert {file.split("/")[0] for file in plainly["files"]} == {"checkpoint-4", "checkpoint-8"}


def test_a_run_that_is_resumed_at_its_end_trains_no_further(tmp_path):
    case = Case(do=resume("end"))
    plainly = outcome(tmp_path / "plain", case, Trainer)
    ours = outcome(tmp_path / "ours", case, SparseTrainer, DENSE)
    assert plainly["state"][0] == STEPS + 1  # the plain Trainer looks for the end after a step only
    assert ours["state"][0] == STEPS
    whole = outcome(tmp_path / "whole", Case(), Trainer)
    same({"weights": whole["weights"]}, {"weights": ours["weights"]})


@pytest.mark.parametrize(("kind", "error"), [(Trainer, ValueError), (SparseTrainer, FileNotFoundError)])
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, kind, error):
    result = outcome(tmp_path, Case(do=resume("nowhere"), error=error), kind, DENSE)
    assert result["error"] is error
    assert result["state"][0] == 0


SPARSE = {method: SparsityConfig(method=method, sparsity=0.8, update_interval=2) for method in ("chtss", "rigl")}
# All sets with one of the two, and with both those that begin a run again, in the middle or anew
SPARSE_CASES = [
    (name, method)
    for name, case in CASES.items()
    for method in SPARSE
    # RigL would compile its update steps too, which takes as long as all else
    if any(word in name for word in ("resumed", "too large", "twice"))
    or (method == "chtss") == (case.neutral or name == "compiled")
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By method, how the base case ends."""
    return {
        method: outcome(tmp_path_factory.mktemp("base") / method, CASES["base"], SparseTrainer, config)
        for method, config in SPARSE.items()
    }


@pytest.mark.parametrize(("name", "method"), SPARSE_CASES)
def test_a_sparse_run_keeps_its_invariants_in(tmp_path, bases, name, method):
    case = CASES[name]
    first = outcome(tmp_path / "first", case, SparseTrainer, SPARSE[method])
    if case.neutral:
        for part in ("weights", "masks", "updates"):
            same({part: bases[method][part]}, {part: first[part]})
    ours = {Path(file).name for file in first["files"] if not file.startswith("topology/")}
    plainly = {"model.safetensors", "config.json", "generation_config.json", "training_args.bin", "trainer_state.json",
               "optimizer.pt", "scheduler.pt", "rng_state.pth", "train_results.json", "all_results.json"}  # fmt: skip
    assert ours <= plainly | OUR_FILES | OUR_SPARSE_FILES
    if case.error is None:
        assert len(first["masks"]) == 14
        for layer, mask in first["masks"].items():
            assert first["weights"][f"{layer}.weight"][~mask].eq(0).all()
            assert method == "chtss" or int(mask.sum()) == round(0.2 * mask.numel())
