"""What is printed when training begins: the layers, the topology updates to come, and changes since the checkpoint."""

import math
from collections.abc import Sized
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset

from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.targets import matrix_shape, why_dense
from hf_chts.layers.wrappers import named_originals
from hf_chts.names import last_part
from hf_chts.schedule_plan import SchedulePlan
from hf_chts.sharding.partitions import weight_shape
from hf_chts.text_table import text_table


def layer_lines(sparse: SparseLayers) -> list[str]:
    """A table of all linear layers, sparse or not and why. Layers of one kind and shape share a line."""
    model, modules = sparse.model, named_originals(sparse.model)
    reasons = why_dense(model, sparse.config, sparse.layers)
    shapes = {name: matrix_shape(modules[name]) for name in (*sparse.layers, *reasons)}
    in_layers = {id(modules[name].get_parameter("weight")) for name in reasons}
    in_layers |= {id(layer.parameter) for layer in sparse.layers.values()}
    others = sum(weight_shape(p).numel() for p in model.parameters() if id(p) not in in_layers)
    links = {name: layer.links for name, layer in sparse.layers.items()}

    header = f"layers: {len(links)} sparse with {sum(links.values()):,} links, {sparse.sparsity():.1%} sparse"
    if abs(sparse.sparsity() - sparse.config.sparsity) > 1e-3:
        header += f" and {sparse.config.sparsity:.1%} in the end"
    if sparse.config.compute == "sparse":
        header += ", multiplied with the links alone"
    alike: dict[tuple[str, tuple[int, int], str], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault((last_part(name), shape, reasons.get(name, "")), []).append(name)
    rows = []
    for (kind, (rows_out, columns_in), reason), names in alike.items():
        what = f"dense: {reason}"
        if not reason:
            total = sum(links[name] for name in names)
            what = f"{total:,} links, {1 - total / (len(names) * rows_out * columns_in):.1%} sparse"
        rows.append([f"{len(names)} ×", kind, f"{rows_out}×{columns_in}", what])
    table = [f"      {line}" for line in text_table(rows, right=[0])]
    return [header, *table, f"      and {others:,} weights outside linear layers, such as embeddings and norms: dense"]


def plan_line(plan: SchedulePlan, learning_rate: str) -> str:
    """When the topology is updated in a run, and what the learning rate does after each update."""
    interval = plan.interval
    updates = [step for step in range(interval, plan.window_end + 1, interval) if plan.is_update(step)]
    if not updates:
        return "topology: no update in this run can change it"
    when = f"after step {updates[0]}" if len(updates) == 1 else f"every {interval} steps, {updates[0]} to {updates[-1]}"
    return f"topology: {len(updates)} update{'s' if len(updates) > 1 else ''}, {when}; {learning_rate}"


def changed_lines(
    plan: SchedulePlan,
    step: int,
    sparsity: float,
    reached: float,
    earlier: SchedulePlan | None,
    rates: tuple[float, float] | None,
) -> list[str]:
    """Warnings where a run differs from its config, or from the run that wrote its checkpoint.

    Args:
        plan: the schedules from `step` on.
        step: of the checkpoint; 0 at the start of a run.
        sparsity: of the layers that train.
        reached: the scheduled sparsity at `step`, which layers with their own sparsity do not have.
        earlier: the schedules of the run that wrote the checkpoint, if it had another length.
        rates: the learning rate in the checkpoint and in the schedule now; None if they are not known.
    """
    lines = []
    length, interval = plan.max_steps, plan.interval
    if earlier is not None:
        line = (
            f"The run goes on to step {length}, that of the checkpoint would have gone to {earlier.max_steps}: the "
            f"last topology update is at step {plan.last_update}, where it was at {earlier.last_update}"
        )
        if rates is None:
            line += "; the learning rate follows the schedule of the new length"
        elif rates[0] != rates[1]:
            line += f"; the learning rate at step {step} was {rates[0]:.3g}, the new schedule has {rates[1]:.3g} there"
        lines.append(line)
    if plan.decay_end and plan.last_update <= step and abs(reached - plan.config.sparsity) > 1e-9:
        # long enough that the schedule ends with the next update
        enough = math.ceil((step // interval + 1) * interval / plan.config.sparsity_schedule_until - 1e-9)
        lines.append(
            f"No topology update is left after step {step} in a run of {length} steps: sparsity ends at {sparsity:.2%} "
            f"and does not reach the {plan.config.sparsity:.2%} of the config, for which the run must have at least "
            f"{enough} steps"
        )
    elif plan.floor:
        last = step // interval * interval
        caught_up = (s for s in range(last, length + 1, interval) if plan.scheduled_sparsity(s) >= plan.floor - 1e-9)
        lines.append(
            f"Sparsity stays at {plan.floor:.2%}, where the schedule of {length} steps has "
            f"{plan.scheduled_sparsity(last):.2%} after step {step}, until that has caught up at step {next(caught_up)}"
        )
    elif earlier is not None and plan.last_update > step:
        update = next(s for s in range(step + 1, length + 1) if plan.is_update(s))
        if plan.sparsity(update) > earlier.sparsity(update) + 1e-9:
            lines.append(
                f"The schedule of {length} steps is ahead of the model: its sparsity goes from {sparsity:.2%} to "
                f"{plan.sparsity(update):.2%} with the update at step {update}"
            )
    return lines


def learning_rates(optimizer: Any, scheduler: Any) -> tuple[float, float] | None:
    """The learning rates of the optimizer and of the schedule at the same step; None without a LambdaLR."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # Accelerate's wrapper
    if not isinstance(scheduler, LambdaLR):
        return None
    return optimizer.param_groups[0]["lr"], float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch))


def sequence_length(dataloader: Any, otherwise: int = 256) -> int:
    """The number of tokens of the first example, if it can be looked at without moving a stream on."""
    dataset = getattr(dataloader, "dataset", None)
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset) or len(dataset) == 0:
        return otherwise
    try:
        example = dataset[0]  # type: ignore[index]
        return max(1, len(example["input_ids"]))
    except (KeyError, TypeError, IndexError):  # of another kind
        return otherwise
