"""Models, configs and runs that several benchmarks share."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from hf_chts import SparsityConfig, sparsify
from hf_chts.evolution.evolver import Evolver

MODELS = Path(__file__).parents[1] / "configs/models"
STEPS = 10_000  # of a run that is `steady`
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


def network(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of configs/models with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / f"{name}.json"), dtype=dtype)


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
