"""A task that trains nothing: its figures follow from seed and settings. Registered by the fixture of conftest.py."""

from dataclasses import dataclass, field
from typing import Any

from hf_chts.studies.figures import Figure
from hf_chts.studies.study import Outcome
from hf_chts.studies.tasks import sparsity_config

FIGURES = {
    "score": Figure("score", "%", better="higher", digits=2),
    "loss": Figure("loss", better="lower", digits=3, papers=True),
    "links": Figure("links", digits=0),
}
CURVES = {"score": "score, %", "itop": "ITOP"}


@dataclass(frozen=True)
class Settings:
    base: float = 0.0
    epochs: int = 3
    name: str = ""
    sparsity: dict[str, Any] = field(default_factory=dict)


def train(run, say):
    say("trains nothing")
    base = run.settings.get("base", 0.0)
    if base < 0:
        raise ValueError(f"base is {base}; it must not be negative")
    figures = {"score": base + run.seed, "loss": 1.0, "links": 1200.0}
    return Outcome(
        figures,
        {"epoch": [1.0, 2.0], "score": [0.0, base + run.seed]},
        10.0,
        8.0,
        sparsity_config(run.settings.get("sparsity", {}), topology_seed=run.seed).to_dict(),
    )
