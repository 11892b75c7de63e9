"""A study of a task that trains nothing, and result files made by hand."""

import json

import pytest
import yaml

from hf_chts.studies.study import Study
from hf_chts.studies.tasks import TASKS

ROWS = {
    "dense": {"label": "dense", "paper": [2.0, 0.25]},
    "set": {"label": "SET", "group": "fixed density", "paper": 3.0, "settings": {"sparsity": {"method": "set"}}},
    "chts": {"label": "CHTs | a", "group": "fixed density", "paper": [1.0, 0.5], "settings": {"base": 2}},
    "gmp": {"group": "density decay", "seeds": [0]},
}


class Made:
    """A study in a folder of its own.

    Attributes:
        path: of its YAML.
        results: its folder of results.
    """

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "made.yaml"
        self.results = folder / "results" / "made"
        self.results.mkdir(parents=True)
        self.write()

    def write(self, **fields):
        """The YAML, with these fields changed."""
        settings = {"epochs": 2, "sparsity": {"method": "chts", "sparsity": 0.9}}
        values = {"title": "A *made* study", "task": "played", "seeds": [0, 1, 2], "settings": settings, "rows": ROWS}
        self.path.write_text(yaml.safe_dump(values | fields, sort_keys=False), encoding="utf-8")
        return self

    def load(self, **options):
        return Study.load(self.path, **options)

    def add(self, name, figures, curves=None, **fields):
        """The result of the run of this name. Returns its path."""
        run = next(run for run in self.load().runs(self.folder) if run.name == name)
        result = {
            "row": run.row, "seed": run.seed, "settings": run.settings, "figures": figures, "seconds": 20.0,
            "processor_seconds": 10.0, "memory_mib": {"peak": 500.4, "before_training": 400.0},
            "machine": {
                "device": "A processor", "threads": 1, "capability": "AVX2", "versions": {"hf_chts": "1", "torch": "2"}
            },
            "command": "hf-chts study made.yaml", "curves": curves or {},
        }  # fmt: skip
        path = self.results / f"{name}.json"
        path.write_text(json.dumps(result | fields), encoding="utf-8")
        return path


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "played", "played_task")
    return Made(tmp_path)
