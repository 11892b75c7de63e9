"""Prune a dense model and train it on sparse, or train sparse from the first step with as many tokens in all.

    python benchmarks/from_weights.py [--sparsity 0.8] [--dense_steps 270] [--steps 60] [--runs DIR]

The demo's model and data. Prints one JSON line: bits per byte of the validation split of the dense model, of the same
pruned, and after training on, for two ways to prune; and of a model that was sparse all along. Runs are kept under
--runs; those that ended are not run again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from setups import parser

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "from_weights"
METHOD = "chts"
DENSE_RATE, SPARSE_RATE = "1.0e-3", "3.0e-3"  # the paper's for LLaMA; the demo's is the second


def train(output: Path, *options: str) -> dict[str, Any]:
    """One run of train_llama.py with the demo's config: its bits per byte, and those of its start if it had weights."""
    if not (output / "eval_results.json").is_file():
        output.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, str(ROOT / "train_llama.py"), "--config", str(ROOT / "configs/demo.yaml"),
            "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(output),
            "--overwrite_output_dir", "true", *options,
        ]  # fmt: skip
        with open(output.with_suffix(".log"), "w") as log:
            subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    figures = {"bits_per_byte": json.loads((output / "eval_results.json").read_text())["eval_bits_per_byte"]}
    start = output / "start_results.json"
    return figures | ({"start": json.loads(start.read_text())} if start.is_file() else {})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sparsity", type=float, default=0.8, help="share of missing links (default: 0.8)")
    arguments.add_argument("--dense_steps", type=int, default=270, help="steps of the dense model (default: 270)")
    arguments.add_argument("--steps", type=int, default=60, help="steps after pruning (default: 60)")
    arguments.add_argument("--runs", type=Path, default=RUNS, help="where the runs go (default: runs/from_weights)")
    options = arguments.parse_args()
    runs = options.runs.resolve()
    sparse = ["--method", METHOD, "--sparsity", str(options.sparsity), "--storage", "links", "--compute", "auto"]
    dense = train(
        runs / "dense", "--method", "dense", "--learning_rate", DENSE_RATE, "--max_steps", str(options.dense_steps)
    )
    rows: dict[str, Any] = {"dense": dense}
    for way in ("magnitude", "wanda"):
        rows[f"pruned by {way}"] = train(
            runs / way, *sparse, "--init", "weights", "--model", str(runs / "dense" / "export"),
            "--initial_topology", way, "--max_steps", str(options.steps), "--warmup_steps", "5",
            "--learning_rate", DENSE_RATE,
        )  # fmt: skip
    together = str(options.dense_steps + options.steps)
    rows["sparse from the first step"] = train(
        runs / "sparse", *sparse, "--learning_rate", SPARSE_RATE, "--max_steps", together
    )
    print(json.dumps({"sparsity": options.sparsity, "method": METHOD, "runs": rows}))


if __name__ == "__main__":
    main()
