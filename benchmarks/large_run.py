"""Memory and time of one real run of train_llama.py, such as LLaMA-7B on one processor or one GPU.

    python benchmarks/large_run.py [--gpu_gib 23] -- --config configs/llama_7b.yaml --storage links [--option value]…

What follows `--` goes to `train_llama.py`. `--gpu_gib` lets the run have that much of the GPU's memory and no more, as
a smaller card would. Prints a JSON line when the training ends, and another when the run does: the seconds before the
first step, those of a step between updates (the median, without the first two), and the peak of memory so far.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from setups import Stopwatch
from transformers.trainer import DEFAULT_CALLBACKS

from hf_chts.commands.train import train


def say(part: str, watch: Stopwatch, begin: float, gpu_gib: float | None) -> None:
    gpu = torch.cuda.is_available()
    found = {
        "benchmark": "large_run",
        "until_the_end_of": part,
        "seconds_before_first_step": round(watch.first - begin, 1),
        "step_seconds": round(statistics.median(watch.seconds[2:]), 3),
        "steps": len(watch.seconds),
        "seconds": round(time.perf_counter() - begin, 1),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "peak_resident_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    if gpu:
        found["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["peak_reserved_gpu_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        found["gpu_gib"] = gpu_gib
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu_gib", type=float, help="how much of the GPU's memory the run may take (default: all)")
    parser.add_argument("options", nargs="*", help="of train_llama.py")
    arguments = parser.parse_args()
    if arguments.gpu_gib:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.gpu_gib * 2**30 / whole)
    begin = time.perf_counter()

    class Watched(Stopwatch):
        def on_train_end(self, *args, **kwargs) -> None:
            say("training", self, begin, arguments.gpu_gib)
            ended.append(self)

    ended: list[Stopwatch] = []
    DEFAULT_CALLBACKS.append(Watched)
    train(arguments.options, program="train_llama.py")
    say("run", ended[0], begin, arguments.gpu_gib)
