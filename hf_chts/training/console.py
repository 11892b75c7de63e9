"""What a run prints: one line for each log and for each topology update, at most 100 columns wide."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import has_length

from hf_chts.plain_text import printable

COLUMNS = 100

_log = logging.getLogger(__name__)

# printed in another form, or of no use in a console
_LEFT_OUT = ("epoch", "step", "total_flos", "num_input_tokens_seen")
_LOSSES = ("loss_before_update", "loss_after_update")

# log key → its name on a line, and its format
_TRAINING = {
    "loss": ("loss", ".4f"),
    "grad_norm": ("gradient norm", ".3g"),
    "learning_rate": ("learning rate", ".2e"),
    "train_tokens_per_second": ("tokens per second", ".0f"),
}
_END = {
    "train_loss": ("mean loss", ".4f"),
    "train_runtime": ("seconds", ".1f"),
    "train_samples_per_second": ("sequences per second", ".2f"),
    "train_steps_per_second": ("steps per second", ".3f"),
    "train_tokens_per_second": ("tokens per second", ".0f"),
    "links": ("links", ",.0f"),
    "average_links": ("on the mean", ",.0f"),
    "parameters": ("parameters", ",.0f"),
    "average_parameters": ("on the mean", ",.0f"),
}
# the same for keys after the name of the evaluated data, such as eval_loss
_EVALUATION = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "runtime": ("seconds", ".1f"),
}
_EVALUATION_LEFT_OUT = ("loss_per_token", "samples_per_second", "steps_per_second")  # the seconds say the same

# a log with all of these keys is of a topology update
_UPDATE = {"sparsity", "links_removed", "links_regrown", "overlap", "itop", "active_neurons", "topology_seconds"}

# the keys of an update's line; other keys of the same log are printed as a log of training
_OF_UPDATE = {*_UPDATE, "softness", "active_neurons_percolated"}


class ConsoleCallback(ProgressCallback, PrinterCallback):
    """Prints the Trainer's logs as lines for people, and draws its progress bars on terminals only.

    The line of an update is printed after the next step, so that it can say how the loss changed. This class replaces
    `ProgressCallback` and `PrinterCallback`, and is a subclass of both, so that `remove_callback` of either removes it.

    Args:
        bars: whether to draw progress bars; `not args.disable_tqdm`.
    """

    def __init__(self, *, bars: bool = True) -> None:
        super().__init__()
        self.bars = bars
        self.update: tuple[int, dict[str, Any]] | None = None

    def _bar(self, **settings: Any) -> Any:
        # disable=None draws only on a terminal: in a file a bar is one line of thousands of columns
        return tqdm(dynamic_ncols=True, disable=None if self.bars else True, **settings)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.update = None
        self.current_step = 0
        if state.is_world_process_zero:
            # an update in the step of the checkpoint is printed after the next step, so not yet
            logged = [x for x in state.log_history if x.get("step") == state.global_step and x.keys() >= _UPDATE]
            self.update = (state.global_step, logged[-1]) if logged else None
            self.training_bar: Any = self._bar(total=state.max_steps)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            bar: Any = self.prediction_bar
            if bar is None:
                total = len(eval_dataloader) if has_length(eval_dataloader) else None
                bar = self.prediction_bar = self._bar(total=total, leave=False, desc="evaluating")
            bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        rest = dict(logs)
        if not self.bars:
            # as PrinterCallback does: the metrics that train() returns have no total_flos then
            logs.pop("total_flos", None)
        last = state.log_history[-1] if state.log_history else {}
        if "total_flos" in last:  # another printer may have popped it from `logs`
            rest["total_flos"] = last["total_flos"]
        losses = {name: rest.pop(name) for name in _LOSSES} if rest.keys() >= set(_LOSSES) else {}
        if losses:
            self._print_update(losses, state.global_step)
        if rest.keys() >= _UPDATE:
            self._print_update({}, state.global_step)  # the one before, whose losses were not logged
            self.update = (state.global_step, {name: rest.pop(name) for name in _OF_UPDATE & rest.keys()})
        if rest.keys() - set(_LEFT_OUT):
            _write(log_line(state.global_step, rest))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._print_update({}, state.global_step)  # no loss follows an update in the last step
        super().on_train_end(args, state, control, **kwargs)

    def _print_update(self, losses: Mapping[str, float], step: int) -> None:
        if self.update is not None:
            step, figures = self.update
            self.update = None
            _write(update_line(step, {**figures, **losses}))
        elif losses:  # the update itself was printed before the run was stopped
            _write(f"{step:>6}  the first step after an update: {_difference(losses)}")


def update_line(step: int, figures: Mapping[str, Any]) -> str:
    """The line of a topology update, with the links of all layers on all ranks."""
    parts = [
        f"{figures['sparsity']:.1%} sparse",
        f"−{_count(figures['links_removed'])} +{_count(figures['links_regrown'])}",
        f"overlap {figures['overlap']:.0%}",
        f"ITOP {figures['itop']:.2f}",
        f"active {figures['active_neurons']:.1%}".replace("100.0%", "100%"),
    ]
    if "softness" in figures:
        parts.append(f"δ{figures['softness']:.2f}")
    if all(name in figures for name in _LOSSES):
        parts.append(_difference(figures))
    seconds = figures["topology_seconds"]
    parts.append(f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s")
    return f"{step:>6}  {'  '.join(parts)}"


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """The line of any other log; keys that callbacks or users added may take further, indented lines."""
    title, table, left_out = _title(logs)
    shown = [key for key in table if isinstance(logs.get(key), int | float)]
    known = [f"{table[key][0]} {logs[key]:{table[key][1]}}" for key in shown]
    others = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in logs.items()
        if key not in shown and key not in left_out
    ]
    lines = [f"{step:>6}  {title}"]
    for part in [*known, *others]:
        gap = "" if lines[-1].endswith(" ") else "  "
        if len(lines[-1]) + len(gap) + len(part) > COLUMNS:
            lines.append(" " * 8 + part)
        else:
            lines[-1] += gap + part
    return "\n".join(lines)


def _title(logs: Mapping[str, Any]) -> tuple[str, Mapping[str, tuple[str, str]], Collection[str]]:
    """Beginning of a log's line, name and format of its known keys, and the keys to leave out.

    No single key tells the kind of log: with `include_num_input_tokens_seen` every log has a `train_runtime`, and
    users may call their figures train_… or eval_…, and their evaluation data anything.
    """
    if "total_flos" in logs and "train_runtime" in logs:  # logged once, at the end of training
        return "done: ", _END, _LEFT_OUT
    if "loss" not in logs:  # every log of training steps has it, and no evaluation
        names = sorted((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), key=len)
        if not names and all(key.startswith("eval_") for key in logs if key not in _LEFT_OUT):
            names = ["eval"]
        if names:
            name = names[0]  # the shortest: a user's own figure may be called eval_model_runtime
            title = f"validation {name[5:]}".rstrip() if f"{name}_".startswith("eval_") else name
            table = {f"{name}_{key}": called for key, called in _EVALUATION.items()}
            return f"{title}: ", table, (*_LEFT_OUT, *(f"{name}_{key}" for key in _EVALUATION_LEFT_OUT))
    # with the counted tokens the Trainer logs the seconds since the run began
    counted = ("train_runtime",) if "num_input_tokens_seen" in logs else ()
    return "", _TRAINING, (*_LEFT_OUT, *counted)


def use_console(trainer: Any) -> None:
    """Replace the Trainer's own progress and printing callbacks; a notebook's and a user's stay."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(ConsoleCallback(bars=type(callback) is ProgressCallback))


def say(trainer: Any, line: str) -> None:
    """Print a line on the console of a trainer; log it as an info where the trainer has none, as in notebooks."""
    if any(isinstance(callback, ConsoleCallback) for callback in trainer.callback_handler.callbacks):
        _write(line)
    else:
        _log.info(line)


def _write(line: str) -> None:
    tqdm.write(printable(line))


def _difference(losses: Mapping[str, float]) -> str:
    before, after = (losses[name] for name in _LOSSES)
    return f"loss {after - before:+.3f}".replace("-", "−")


def _count(links: int) -> str:
    """A number of links in at most four characters, such as 9.9k, 325k or 1.4M."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if links >= 0.9995 * size:
            value = links / size
            return f"{value:.0f}{letter}" if value >= 9.95 else f"{value:.1f}{letter}"
    return str(links)
