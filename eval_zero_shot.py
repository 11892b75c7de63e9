"""Evaluate exported models on lm-eval tasks, side by side; the same as `hf-chts evaluate`.

python eval_zero_shot.py runs/demo/export
python eval_zero_shot.py runs/dense runs/chts org/name --suite commonsense,wikitext --output results.json
accelerate launch eval_zero_shot.py runs/chts --suite glue          # shares the documents out over the GPUs
"""

from hf_chts.commands.app import EVALUATE_EPILOG, evaluate, run_alone

if __name__ == "__main__":
    run_alone(evaluate, "eval_zero_shot.py", epilog=EVALUATE_EPILOG)
