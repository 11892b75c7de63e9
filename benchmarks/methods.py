"""Train the demo model with every method at one sparsity, and write what each reached as a table.

    python benchmarks/methods.py [--sparsity 0.8] [--max_steps 180] [--methods set rigl …] [--table docs/methods.md]

Prints one JSON line per method. Runs are kept under --runs; those that ended are not run again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from setups import parser

from hf_chts import SparsityConfig
from hf_chts.methods import METHODS

ROOT = Path(__file__).parents[1]
LIMIT = 2.3  # bits per byte on the validation split


def train(method: str, sparsity: float, max_steps: int, runs: Path) -> dict[str, Any]:
    """One run of train_llama.py with the demo's config; its figures."""
    output = runs / method
    if not (output / "eval_results.json").is_file():
        output.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable, str(ROOT / "train_llama.py"), "--config", str(ROOT / "configs/demo.yaml"),
            "--method", method, "--sparsity", str(sparsity), "--max_steps", str(max_steps),
            "--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir", str(output),
        ]  # fmt: skip
        with open(output / "log.txt", "w") as log:
            subprocess.run(command, check=True, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    evaluation = json.loads((output / "eval_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    updates = [entry for entry in history if "topology_seconds" in entry]
    return {
        "method": method,
        "sparsity": (updates[-1] if updates else vars(SparsityConfig(method=method, sparsity=sparsity)))["sparsity"],
        "bits_per_byte": evaluation["eval_bits_per_byte"],
        "perplexity": evaluation["eval_perplexity"],
        "below_limit": evaluation["eval_bits_per_byte"] < LIMIT,
        "updates": len(updates),
        "itop": updates[-1]["itop"] if updates else None,
        "topology_seconds": sum(entry["topology_seconds"] for entry in updates),
    }


def table(rows: list[dict[str, Any]], command: str, sparsity: float, max_steps: int) -> str:
    lines = [
        "# The methods on the demo model",
        "",
        f"The demo's LLaMA (7.6 M parameters) trained on its corpus for {max_steps} steps of 4,096 tokens, at "
        f"{sparsity:.0%} sparsity (`dense` at 0), otherwise as configs/demo.yaml says, one seed, on two CPU cores. All "
        "rates and schedules are the demo's, tuned for none of the methods: the table shows that each of them trains, "
        "and is no ranking.",
        "",
        f"`{command}`",
        "",
        "| method | sparsity | bits per byte | perplexity | updates | links ever active (ITOP) | seconds on topology |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        itop = "" if row["itop"] is None else f"{row['itop']:.1%}"
        lines.append(
            f"| `{row['method']}` | {row['sparsity']:.2%} | {row['bits_per_byte']:.3f} | {row['perplexity']:.1f} | "
            f"{row['updates']} | {itop} | {row['topology_seconds']:.1f} |"
        )
    lines += ["", "Bits per byte and perplexity are of the validation split, after training."]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="(default: all)")
    arguments.add_argument("--sparsity", type=float, default=0.8, help="final share of missing links (default: 0.8)")
    arguments.add_argument("--max_steps", type=int, default=180, help="optimizer steps of a run (default: 180)")
    arguments.add_argument(
        "--runs", type=Path, default=ROOT / "runs" / "methods", help="where the runs go (default: runs/methods)"
    )
    arguments.add_argument("--table", type=Path, default=None, help="a Markdown file to write (default: none)")
    options = arguments.parse_args()
    rows = []
    for method in options.methods:
        rows.append(train(method, options.sparsity, options.max_steps, options.runs.resolve()))
        print(json.dumps(rows[-1]), flush=True)
    if options.table:
        command = " ".join(["python benchmarks/methods.py", *sys.argv[1:]])
        options.table.write_text(table(rows, command, options.sparsity, options.max_steps), encoding="utf-8")
    failed = [row["method"] for row in rows if not row["below_limit"]]
    if failed:
        raise SystemExit(f"not below {LIMIT} bits per byte: {', '.join(failed)}")


if __name__ == "__main__":
    main()
