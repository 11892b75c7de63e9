"""The identity of a run, kept in the seals of its checkpoints, its topology state and its records.

The id tells apart runs with the same settings. The seeds, which order the data, and the settings that a script adds
(`SparseTrainer.made_of`) must not change when a run is resumed.
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

from hf_chts.checkpoint.seal import sealed_run
from hf_chts.config import SparsityConfig

_SEEDS = ("seed", "data_seed")  # they decide the order of the data


@dataclass(frozen=True)
class RunIdentity:
    """One run, from its start through all resumes.

    Attributes:
        id: unique.
        begun: the time in UTC; "" if a version without identities began the run.
        seed, data_seed: of its TrainingArguments.
        sparsity: digest of its SparsityConfig.
        made_of: further settings that must stay the same on resume, name → JSON value.
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
        plain = json.loads(json.dumps(dict(made_of)))  # as read back later: tuples become lists
        return cls(uuid4().hex, now, args.seed, args.data_seed, config_digest(config), plain)

    @classmethod
    def of_checkpoint(cls, directory: str | Path) -> "RunIdentity | None":
        """The run of a checkpoint; None if its seal does not name one, as in early versions."""
        known = {one.name for one in fields(cls)}
        saved = {name: value for name, value in (sealed_run(directory) or {}).items() if name in known}
        try:
            return cls(**saved)
        except TypeError:  # something is missing
            return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        when = f"begun {self.begun}, " if self.begun else ""
        return f"run {self.id[:8]}, {when}seed {self.seed}"

    def check_same(self, now: "RunIdentity", directory: str, *, data_anew: bool) -> "RunIdentity":
        """The identity of this run as it continues, with the entries of `now.made_of`.

        Args:
            now: the identity that a new run would have.
            directory: the checkpoint, for the message.
            data_anew: whether the data start over (`ignore_data_skip`), so that seeds may differ.

        Raises:
            ValueError: a seed or an entry of `made_of` differs; the message names all that do.
        """
        before, today = ({**{name: getattr(run, name) for name in _SEEDS}, **run.made_of} for run in (self, now))
        names = [name for name in before if name in today and not (data_anew and name in _SEEDS)]
        names = [name for name in names if before[name] != today[name]]
        if names:
            differing = "; ".join(f"{name}: {before[name]!r} there, {today[name]!r} here" for name in names)
            remedy = "to start over, use another output_dir; to resume, use the settings of that run"
            if any(name in _SEEDS for name in names):
                remedy += ", or change the seed with ignore_data_skip, which starts the data over"
            raise ValueError(f"{directory} is of another run ({self}): {differing}. Remedy: {remedy}")
        return replace(self, made_of={**self.made_of, **now.made_of})


def config_digest(config: SparsityConfig) -> str:
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode()).hexdigest()[:16]
