"""One thread: the models here are so small that sharing their work out costs more than it saves."""

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
