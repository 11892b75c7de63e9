"""Which run this is: made when one begins, kept in its checkpoints' seals, its topology's state and its records.

Two runs may have the same settings; the id tells them apart. What a run is made of tells whether one that is resumed is
still the same: its seed, which orders the data, and what a script adds (`SparseTrainer.made_of`).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import TrainingArguments

from hf_chts.config import SparsityConfig
from hf_chts.seal import all_sealed, sealed, sealed_run

_SEEDS = ("seed", "data_seed")  # which decide the order of the data


@dataclass(frozen=True)
class RunIdentity:
    """One run, in however many pieces it is trained.

    Attributes:
        id: of this run alone.
        begun: when, in UTC; empty where a version without identities began it.
        seed, data_seed: of its arguments.
        sparsity: a digest of its sparsity config.
        made_of: what else it is made of, by name, as JSON can hold it.
    """

    id: str
    begun: str
    seed: int
    data_seed: int | None
    sparsity: str
    made_of: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(
        cls, args: TrainingArguments, config: SparsityConfig, made_of: Mapping[str, Any], *, begun: bool = True
    ) -> "RunIdentity":
        now = datetime.now(timezone.utc).isoformat(timespec="seconds") if begun else ""
        plain = json.loads(json.dumps(dict(made_of)))  # as it will come back: tuples are lists
        return cls(uuid4().hex, now, args.seed, args.data_seed, config_digest(config), plain)

    @classmethod
    def of_checkpoint(cls, directory: str | Path) -> "RunIdentity | None":
        """The run of a checkpoint; None where its seal does not say, as those of earlier versions."""
        known = {one.name for one in fields(cls)}
        saved = {name: value for name, value in (sealed_run(directory) or {}).items() if name in known}
        try:
            return cls(**saved)
        except TypeError:  # not all that there must be
            return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        when = f"begun {self.begun}, " if self.begun else ""
        return f"run {self.id[:8]}, {when}seed {self.seed}"

    def check_same(self, now: "RunIdentity", directory: str, *, data_anew: bool) -> "RunIdentity":
        """This run as it goes on, with what it is made of by then.

        Args:
            now: how it would be if it began now.
            data_anew: whether the data are to begin anew in another order, so that the seeds may differ.

        Raises:
            ValueError: it is made of something else; the message names all that differs.
        """
        before, today = ({**{name: getattr(run, name) for name in _SEEDS}, **run.made_of} for run in (self, now))
        names = [name for name in before if name in today and not (data_anew and name in _SEEDS)]
        names = [name for name in names if before[name] != today[name]]
        if names:
            differing = "; ".join(f"{name}: {before[name]!r} there, {today[name]!r} here" for name in names)
            remedy = "give this run another output_dir, or resume with what that run has"
            if any(name in _SEEDS for name in names):
                remedy += "; a seed may change with ignore_data_skip, which begins the data anew"
            raise ValueError(f"{directory} is of another run ({self}): {differing}. To begin anew, {remedy}")
        return replace(self, made_of={**self.made_of, **now.made_of})


def config_digest(config: SparsityConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_folder_of_another_run(output_dir: str, mine: set[str | None], *, overwrite: bool) -> None:
    """Raises ValueError for a folder with whole checkpoints of another run, which would be mixed with this one's.

    Args:
        mine: the ids of this run, and of those that the same trainer has trained before.
        overwrite: the user has said that this run is to go there anyway.
    """
    foreign = [path for path in sealed(output_dir) if (sealed_run(path) or {}).get("id") not in mine]
    if foreign and not overwrite:
        last = foreign[-1]
        identity = RunIdentity.of_checkpoint(last)
        of = f" ({identity})" if identity else ""
        raise ValueError(
            f"{output_dir} has checkpoints of another run{of}, up to {last.name}, and this run would be mixed with it: "
            "go on with that one (resume_from_checkpoint true), give this one another output_dir, or begin anew in the "
            "same folder with overwrite_output_dir true (of SparseTrainingArguments), which passes over what is there, "
            "or without it"
        )


def passed_over(output_dir: str, checkpoint: str | None, step: int) -> list[Path]:
    """The whole checkpoints in a folder that a run does not go on from, which begins there, or resumes after `step`.

    A run that goes back to an earlier checkpoint of its own leaves the later ones behind.
    """
    there, kept = all_sealed(output_dir), set[Path]()
    if checkpoint is not None and Path(checkpoint).resolve().parent == Path(output_dir).resolve():
        own = RunIdentity.of_checkpoint(checkpoint)
        for path in {*sealed(output_dir), *(path for path in there if path.name == Path(checkpoint).name)}:
            found = RunIdentity.of_checkpoint(path)
            same = own is None or found is None or found.id == own.id
            if same and int(path.name.rsplit("-", 1)[1]) <= step:
                kept.add(path)
    return [path for path in there if path not in kept]
