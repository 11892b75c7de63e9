"""What version 0.1.0 wrote is still read, resumed and exported, with the figures that it had then.

make.py wrote the folder `0.1.0`; nothing in it is ever written again. Losses and logits may differ by rounding on other
processors, masks and links may not.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import INTERVAL, differences
from earlier_runs import CASES, SAVED, links_by_layer, logits, losses_after, trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_chts import SparsityConfig, SparsityHandle, load_sparse
from hf_chts.checkpoint import load_topology
from hf_chts.config_file import read_mapping
from hf_chts.evaluation import compare_models
from hf_chts.export import pack_directory, unpack_directory
from hf_chts.export.zero_shot_results import read_results
from hf_chts.report import write_report

EARLIER = Path(__file__).parent / "0.1.0"
FIGURES = json.loads((EARLIER / "figures.json").read_text())
# soft choices of later versions draw other links, in the same proportions
OTHER_LINKS = {"adaptive"}
KINDS = {"chtss": {"explored"}, "gmp": {"explored", "stored"}, "adaptive": {"explored", "born", "softness"}}


def close(found, recorded):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(recorded), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_runs_are_resumed(tmp_path, case):
    directory = shutil.copytree(EARLIER / case, tmp_path / case)
    state = load_topology(directory / f"checkpoint-{SAVED}")
    assert (state.step, len(state.history)) == (SAVED, 3)
    assert {kind for kind in ("explored", "stored", "born", "softness") if getattr(state, kind)} == KINDS[case]

    run = trainer(directory, case, seed=1)
    run.train(resume_from_checkpoint=True)
    losses, recorded = losses_after(run, SAVED), FIGURES[case]["losses"]
    if case in OTHER_LINKS:
        close(losses[:INTERVAL], recorded[:INTERVAL])  # up to the next update
        assert losses == pytest.approx(recorded, rel=0.01)
        wanted = [row for rows in FIGURES[case]["links"].values() for row in rows]
        assert run.sparse.links() == sum(int(row).bit_count() for row in wanted)
        run.sparse.check()
        return
    close(losses, recorded)
    close(logits(run.model).tolist(), FIGURES[case]["logits"])
    assert links_by_layer(run.sparse.masks()) == FIGURES[case]["links"]
    if case == "chtss":  # the records that end with the run, and its own id, go on as those of the run that was whole
        name = Path("topology/layers.jsonl")
        assert (directory / name).read_text() == (EARLIER / case / name).read_text()


def test_exports_are_loaded(tmp_path):
    recorded = FIGURES["chtss"]
    models = {kind: load_sparse(EARLIER / kind) for kind in ("plain", "packed")}
    for model in models.values():
        sparse = SparsityHandle.of(model)
        sparse.check()
        assert links_by_layer(sparse.masks()) == recorded["links"]
        close(logits(model).tolist(), recorded["logits"])
    for kind in models:
        model = AutoModelForCausalLM.from_pretrained(EARLIER / kind)
        close(logits(model).tolist(), recorded["logits"])
        assert not differences(model.state_dict(), models["plain"].state_dict())


@pytest.mark.parametrize(("source", "other", "convert"), [
    ("plain", "packed", pack_directory), ("packed", "plain", unpack_directory),
])  # fmt: skip
def test_exports_are_converted(tmp_path, source, other, convert):
    convert(EARLIER / source, tmp_path / "new")
    for path in (EARLIER / other).glob("*.safetensors"):
        assert not differences(load_file(tmp_path / "new" / path.name), load_file(path))


def test_configs_are_read():
    config = SparsityConfig.load(EARLIER / "chtss")
    assert config == SparsityConfig.load(EARLIER / "packed")
    settings = read_mapping(EARLIER / "run.yaml", "configs")
    assert settings.pop("max_steps") == 24
    assert (config.method, config.sparsity) == (settings["method"], settings["sparsity"]) == ("chtss", 0.8)


def test_report_of_a_run(tmp_path):
    page = write_report([shutil.copytree(EARLIER / "chtss", tmp_path / "run")]).read_text(encoding="utf-8")
    assert not [value for value in FIGURES["report"].values() if value not in page]


def test_results_are_compared():
    results = json.loads((EARLIER / "results.json").read_text())
    assert compare_models(results)[1]["difference"] == FIGURES["results"]
    tasks = read_results(EARLIER / "results.json", ["second"])["tasks"]
    assert tasks == results[1]["tasks"]
