"""auto_find_batch_size for sparse runs: each attempt starts exactly as a run with that batch size would.

The plain Trainer keeps the weights and moments of a failed attempt and only restarts the schedules. A sparse run would
then continue with masks that are already sparser than its schedule. So weights, masks, optimizer, random numbers and
callbacks are restored to their state before the first attempt, and checkpoints of the failed attempt are deleted. Dense
runs behave as in the Trainer.
"""

import copy
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_chts.layers.sparse_layer import SparseLayer
from hf_chts.topology.bits import pack_bits, unpack_bits
from hf_chts.training.any_trainer import AnyTrainer
from hf_chts.training.callback import TopologyCallback

_log = logging.getLogger(__name__)


class _Start:
    """The state of a trainer before its first attempt, on the CPU.

    Args:
        weights: whether to copy weights and masks; not needed where they are loaded from a checkpoint.
    """

    def __init__(self, trainer: Any, *, weights: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.topologies: dict[str, tuple[Tensor, Tensor | None]] = {}
        if weights:
            self.topologies = {
                name: (pack_bits(layer.topology).cpu(), _on_cpu(layer.storage.slot_positions))
                for name, layer in trainer.sparse.layers.items()
            }
            self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in _tensors(trainer.model).items()}
        self.flos = trainer.current_flos
        self.optimizer = trainer.optimizer
        # the Trainer makes its own schedule anew, but keeps one that the user passed
        self.schedule = None if trainer._created_lr_scheduler else trainer.lr_scheduler
        kept = [part for part in (self.optimizer, self.schedule) if part is not None]
        self.states = [(part, _on_cpu(part.state_dict())) for part in kept]
        self.attributes = [
            (part, copy.deepcopy(part.state().get("attributes", {})))
            for part in (*trainer.callback_handler.callbacks, trainer.control)
            if isinstance(part, ExportableState)
        ]
        self.random = _random_numbers(trainer.args.device)

    @torch.no_grad()
    def restore(self, trainer: Any) -> None:
        for name, tensor in _tensors(trainer.model).items() if self.tensors else ():
            tensor.copy_(self.tensors[name])
        for name, (bits, slots) in self.topologies.items():
            storage = trainer.sparse.layers[name].storage
            storage.restore(unpack_bits(bits, storage.shape).to(storage.device), slots)
        trainer.current_flos = self.flos
        trainer.optimizer = self.optimizer
        if self.schedule is not None or not trainer._created_lr_scheduler:
            trainer.lr_scheduler = self.schedule
        for part, state in self.states:
            part.load_state_dict(copy.deepcopy(state))
        for part, attributes in self.attributes:
            for name, value in attributes.items():
                setattr(part, name, copy.deepcopy(value))
        _set_random_numbers(trainer.args.device, self.random)


class FreshAttempts(AnyTrainer):
    """The part of SparseTrainer that restarts with a smaller batch, from the start or from the resumed checkpoint."""

    topology_callback: TopologyCallback | None
    _attempts: int = 0  # of this `train()`
    _start: _Start | None = None
    _written: tuple[Path, ...] = ()  # the checkpoints of this attempt

    def reset_attempts(self) -> None:
        """Called when `train()` begins."""
        self._attempts, self._start, self._written = 0, None, ()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, which calls it once per attempt.

        Raises:
            RuntimeError: a second attempt is needed, but a sharded engine holds the weights, which cannot be restored.
        """
        self._attempts += 1
        if self.args.auto_find_batch_size and self.topology_callback is not None:
            checkpoint = kwargs.get("resume_from_checkpoint")
            sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
            if self._attempts == 1:
                self._start = _Start(self, weights=checkpoint is None and not sharded)
            else:
                self._begin_again(checkpoint, args[0] if args else kwargs.get("batch_size"), sharded)
        result = super()._inner_training_loop(*args, **kwargs)
        self._start = None
        return result

    def _begin_again(self, checkpoint: str | None, batch_size: Any, sharded: bool) -> None:
        if sharded and checkpoint is None:
            raise RuntimeError(
                f"the batch of this run does not fit into memory, and under {self.accelerator.distributed_type.value} "
                "the weights of the start cannot be put back for another attempt: start anew with "
                f"per_device_train_batch_size {batch_size} or less, and without auto_find_batch_size"
            )
        assert self._start is not None
        assert self.topology_callback is not None
        self._start.restore(self)
        if checkpoint is not None and not sharded:
            self._load_from_checkpoint(checkpoint)  # weights; masks and moments are its own already
        self.topology_callback.warmup = None
        if self.args.should_save:
            for directory in self._written:
                shutil.rmtree(directory, ignore_errors=True)
        removed = f", and its checkpoints ({len(self._written)}) are removed" if self._written else ""
        self._written = ()
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            _log.warning(
                "The last attempt did not fit into memory after step %d. The run begins again %s with batches of %s: "
                "nothing is left of that attempt%s",
                self.state.global_step,
                f"from {checkpoint}" if checkpoint else "with the weights and masks of its start",
                batch_size,
                removed,
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._written = (*self._written, directory)
        super()._save_checkpoint(model, trial)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Weights and buffers by name, but for those of topologies, which their owners write."""
    module = cast(nn.Module, model)
    layers = [layer for layer in module.modules() if isinstance(layer, SparseLayer)]
    owned = {id(buffer) for layer in layers for buffer in layer.storage.buffers()}
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if id(tensor) not in owned}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return copy.deepcopy(value)


def _random_numbers(device: torch.device) -> tuple[Any, ...]:
    of_device = getattr(torch, device.type)
    on_device = of_device.get_rng_state() if hasattr(of_device, "get_rng_state") else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device  # noqa: NPY002 - what others use


def _set_random_numbers(device: torch.device, states: tuple[Any, ...]) -> None:
    python, numpy, cpu, on_device = states
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002 - as above
    torch.set_rng_state(cpu)
    if on_device is not None:
        getattr(torch, device.type).set_rng_state(on_device)
