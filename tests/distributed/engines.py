"""The same training loop on every engine: what differs is how a model is wrapped, stepped and read."""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from cpu_engines import use_gloo_alone

CLIP = 0.5


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)


class Replicated:
    """One process, or DDP."""

    def __init__(self, model, bf16, accumulation):
        self.model = self.module = model
        self.bf16, self.accumulation = bf16, accumulation
        if dist.is_initialized():
            self.model = torch.nn.parallel.DistributedDataParallel(model)
        self.optimizer = adam(model.parameters())

    def backward(self, ids, last):
        # DDP's no_sync, as accelerate uses it, on all micro-batches but the last
        with nullcontext() if last or self.model is self.module else self.model.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.model(input_ids=ids, labels=ids).loss / self.accumulation
            loss.backward()

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole(self, parameter, key=None):
        """The weight that the optimizer steps on, or one of its moments, by the engine's own means."""
        return (parameter.detach() if key is None else self.optimizer.state[parameter][key]).clone()

    def working(self, parameter):
        """The weight of the forward."""
        return self.whole(parameter)


class Fsdp2(Replicated):
    def __init__(self, model, bf16, accumulation):
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.accumulation = accumulation
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
        if not isinstance(model, FSDPModule):
            for block in model.model.layers:
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
        self.model = self.module = model
        self.optimizer = adam(model.parameters())

    def backward(self, ids, last):
        self.model.set_requires_gradient_sync(last)
        (self.model(input_ids=ids, labels=ids).loss / self.accumulation).backward()

    def whole(self, parameter, key=None):
        return (parameter.detach() if key is None else self.optimizer.state[parameter][key]).full_tensor()


class Zero:
    def __init__(self, model, bf16, accumulation, stage, **changes):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        use_gloo_alone()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | changes.pop("zero", {}),
            "zero_force_ds_cpu_optimizer": False,
        } | changes
        self.stage = stage
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=adam(model.parameters()), config=config
        )
        self.module = self.model.module

    def backward(self, ids, last):
        self.model.backward(self.model(input_ids=ids, labels=ids).loss)
        if not last:
            self.model.step()

    def step(self):
        self.model.step()

    def whole(self, parameter, key=None):
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    def working(self, parameter):
        import deepspeed

        # small weights stay gathered between steps, and leaving the context would part them
        parted = self.stage == 3 and parameter.ds_status.name != "AVAILABLE"
        with deepspeed.zero.GatheredParameters([parameter], enabled=parted):
            return parameter.detach().clone()
