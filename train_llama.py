"""Pretrain a sparse language model: `accelerate launch train_llama.py --config configs/X.yaml [--field value]…`

The same as `hf-chts train`. To change what a run does, copy build_trainer and train of hf_chts/commands/train.py.
"""

import sys

from hf_chts.commands import end_rank
from hf_chts.commands.train import train

if __name__ == "__main__":
    train(sys.argv[1:], program="train_llama.py")
    end_rank()
