"""What engines that are made for GPUs need on the CPU."""

import os
import sys

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_fsdp():
    """Let accelerate turn FSDP on, which it keeps for GPUs, where its launcher was told to.

    To be called between TrainingArguments, which makes accelerate's state anew, and the Trainer.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # one of the types that FSDP may be turned on for
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def use_gloo_alone():
    """Keep DeepSpeed from compiling collectives of its own for the CPU.

    That takes minutes, and a rank that is killed meanwhile leaves a lock that all later ones wait for.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def leave_ranks():
    """End this process well, once all ranks have come so far.

    gloo's threads may abort a process that goes on to destroy its groups, or that is left to Python's end.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
