"""A plain PyTorch loop under FSDP2: a sparse LLaMA from the first step, its topology evolved over all ranks.

torchrun --nproc_per_node 2 examples/fsdp2_loop.py --steps 40
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from hf_chts import SparsityConfig, sparsify

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--method", default="chtss")
steps, method = vars(parser.parse_args()).values()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group()
rank = dist.get_rank()
if device.type == "cuda":
    torch.cuda.set_device(device := torch.device("cuda", rank % torch.cuda.device_count()))

torch.manual_seed(0)  # the same weights on every rank
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
model = LlamaForCausalLM(config).to(device)
sparse = sparsify(model, SparsityConfig(method, sparsity=0.9, update_interval=10))
for block in model.model.layers:
    fully_shard(block)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=4, num_training_steps=steps)
evolver = sparse.evolver(optimizer, max_steps=steps)
evolver.warm_up(scheduler)

text = torch.tensor(list(Path(__file__).read_bytes()), device=device)  # bytes are tokens
generator = torch.Generator().manual_seed(rank)  # other data on every rank
for step in range(1, steps + 1):
    starts = torch.randint(len(text) - 64, (8,), generator=generator).tolist()
    batch = torch.stack([text[start : start + 64] for start in starts])
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if (figures := evolver.step()) and rank == 0:
        print(f"{step:4}  loss {loss.item():.3f}  sparsity {figures['sparsity']:.1%}", flush=True)
evolver.check()  # weights and moments are 0 where there is no link
dist.barrier()
dist.destroy_process_group()
