"""Write what this version leaves behind into the folder of its number, with the figures that later ones must find.

`python tests/earlier/make.py`, from the repository's root and with the version of that folder alone: what is there
stays as that version wrote it, and is never made anew by a later one.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from earlier_runs import CASES, SAVED, STEPS, links_by_layer, logits, losses_after, trainer  # noqa: E402
from evaluation.conftest import byte_tokenizer, make_tiny_llama  # noqa: E402

import hf_chts  # noqa: E402
from hf_chts import export_sparse  # noqa: E402
from hf_chts.evaluation import compare_models, evaluate_zero_shot  # noqa: E402
from hf_chts.evaluation.result_files import write_results  # noqa: E402
from hf_chts.report.run import read_run  # noqa: E402
from hf_chts.report.summary import summary_rows  # noqa: E402


def main() -> None:
    target = HERE / hf_chts.__version__
    target.mkdir()
    os.chdir(target)  # so that files name no other folder
    figures = {case: trained(case) for case in CASES}
    figures["report"] = {row.name: row.cells[0] for row in summary_rows([read_run(Path("chtss"))])}
    figures["results"] = evaluated()
    Path("figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def trained(case: str) -> dict:
    """Train a run and keep its records and the checkpoint in its middle."""
    run = trainer(Path(case), case)
    run.train()
    run.save_metrics("eval", run.evaluate(), combined=False)
    run.save_state()
    masks = run.sparse.masks()
    found = {"losses": losses_after(run, SAVED), "links": links_by_layer(masks), "logits": logits(run.model).tolist()}
    if case == "chtss":
        export_sparse(run.model, "plain")
        export_sparse(run.model, "packed", packed=True)
        run.sparse.config.save(Path(case) / "sparsity_config.json")
        run.model.config.save_pretrained(case)
        Path("run.yaml").write_text(yaml.safe_dump({"max_steps": STEPS, **CASES[case]}), encoding="utf-8")
    else:
        shutil.rmtree(f"{case}/topology")
    shutil.rmtree(f"{case}/checkpoint-{STEPS}")
    Path(case, "training.lock").unlink(missing_ok=True)
    return found


def evaluated() -> dict:
    """Evaluate two models on a few documents, and keep the file of the results."""
    results = []
    for seed, name in enumerate(("first", "second")):
        make_tiny_llama(seed).save_pretrained(name)
        byte_tokenizer.__wrapped__().save_pretrained(name)
        results.append(evaluate_zero_shot(name, "embedded", limit=12))
        shutil.rmtree(name)
    write_results(results, Path("results.json"))
    return compare_models(json.loads(Path("results.json").read_text()))[1]["difference"]


if __name__ == "__main__":
    main()
