"""Models, configs and runs that several benchmarks share."""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, TrainerCallback

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver
from hf_chts.machine import device_name

MODELS = Path(__file__).parents[1] / "configs/models"
VOCABULARY = 128  # of a model that is cut to some of its blocks: hardly anything but sparse layers is left
# sizes that no file of configs/models has: (the model that they differ from, how)
FURTHER = {
    "llama_350m": (
        "llama_130m",
        {"hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "head_dim": 64},
    )
}
STEPS = 10_000  # of a run that is `steady`
# way of training → what its config has beside method and sparsity
STORAGES: dict[str, dict[str, str]] = {
    "masked": {"storage": "masked"},
    "links": {"storage": "links"},
    "sparse": {"storage": "links", "compute": "sparse"},
    "auto": {"storage": "links", "compute": "auto"},
}
# a run that ends only by `StopAfter`, far from its topology's first update, and leaves no files
UNEVENTFUL: dict[str, Any] = {
    "max_steps": 100_000,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class StopAfter(TrainerCallback):
    """Ends a run after some steps, and keeps the time at which each of them ended."""

    def __init__(self, steps: int) -> None:
        self.steps, self.ended = steps, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ended.append(time.perf_counter())
        control.should_training_stop = state.global_step >= self.steps


class Stopwatch(TrainerCallback):
    """Seconds from the begin to the end of each step, without its topology update if it is added before that one."""

    def __init__(self) -> None:
        self.first, self.start, self.seconds = 0.0, 0.0, list[float]()

    def on_step_begin(self, *args, **kwargs) -> None:
        finish()
        self.start = time.perf_counter()
        self.first = self.first or self.start

    def on_step_end(self, *args, **kwargs) -> None:
        finish()
        self.seconds.append(time.perf_counter() - self.start)


def finish() -> None:
    """Wait for what the GPU was given, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_config(name: str) -> PretrainedConfig:
    """A model of configs/models or `FURTHER`; "llama_1b/1" is one block of it, with a small vocabulary."""
    model, _, blocks = name.partition("/")
    base, changes = FURTHER.get(model, (model, {}))
    config = AutoConfig.from_pretrained(MODELS / f"{base}.json")
    config.update(changes | ({"num_hidden_layers": int(blocks), "vocab_size": VOCABULARY} if blocks else {}))
    return config


def network(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model by `model_config`, with these fields of its config changed, and random weights."""
    config = model_config(name)
    config.update(changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where a benchmark runs, and what torch and numba take the processor for."""
    limits = {
        name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ
    }
    target = None
    if importlib.util.find_spec("numba"):
        from llvmlite import binding
        from numba import config

        target = config.CPU_NAME or binding.get_host_cpu_name()
    return {
        "machine": device_name(device),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "numba_target": target,
        "torch": torch.__version__,
    } | limits


def turns(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each of them gives, in turns, and the first of each round in turns too."""
    names, found = list(runs), {name: [] for name in runs}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            found[name].append(runs[name]())
    return found


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Each way's ratios to the dense one of the same round, sorted."""
    return {
        way: sorted(taken / dense for taken, dense in zip(many, seconds["dense"], strict=True))
        for way, many in seconds.items()
    }


def compared(seconds: Mapping[str, list[float]], floor: str = "rest") -> dict[str, Any]:
    """How many times as fast as the dense one each way is: the median over the rounds, and the extremes.

    `bound` is that of the way that leaves out all that is sparse in the others.
    """
    found = ratios(seconds)
    speedup = {way: float(f"{1 / statistics.median(many):.4g}") for way, many in found.items()}
    ways = [way for way in found if way not in ("dense", floor)]
    return {
        "speedup": {way: speedup[way] for way in ways},
        "speedups": {way: [round(1 / found[way][-1], 2), round(1 / found[way][0], 2)] for way in ways},
        "bound": speedup[floor],
    }


def steady(method: str, sparsity: float = 0.9, **changes: Any) -> SparsityConfig:
    """The steady state: each step replaces links at the final sparsity."""
    return SparsityConfig(
        method=method,
        sparsity=sparsity,
        initial_sparsity=sparsity,
        sparsity_schedule="constant",
        update_interval=1,
        **changes,
    )


def lone_layer(shape: tuple[int, int], method: str, sparsity: float) -> tuple[Evolver, Callable[[], None]]:
    """The evolver of one layer, (out, in), and a function that trains it for a step before each `evolver.step()`."""
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
    sparse = sparsify(model, steady(method, sparsity, target_modules=["0"]))
    optimizer = torch.optim.AdamW(model.parameters())
    evolver = sparse.evolver(optimizer, STEPS)

    def train() -> None:
        model(torch.randn(1, shape[1])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return evolver, train


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def with_model(description: str | None) -> argparse.ArgumentParser:
    """A parser with --model."""
    options = parser(description)
    options.add_argument("--model", default="llama_60m", help="a file of configs/models (default: llama_60m)")
    return options
