"""train_llama.py on the launcher's engine, without collectives that DeepSpeed would compile for the CPU first."""

import os
import sys

from cpu_engines import use_gloo_alone

from hf_chts.commands import end_rank
from hf_chts.commands.train import train

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo_alone()
    train(sys.argv[1:], program="train_llama.py")
    end_rank()
