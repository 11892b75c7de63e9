"""Run by the ranks of torchrun: topology changes through `engine_of` on every engine that is named.

    torchrun … engine_worker.py DIRECTORY CASE…

Writes, from rank 0, the weights at the end of each case, to compare among engines and with one process.
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from cpu_engines import leave_ranks, use_gloo_alone
from engines import Fsdp2, Replicated, Zero
from tiny import VOCABULARY, tiny_llama
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_chts import SparsityConfig, sparsify
from hf_chts.layers.links import check_zeros
from hf_chts.sharding.detect import engine_of
from hf_chts.sharding.partitions import held_part
from hf_chts.sharding.ranks import rank_and_world
from hf_chts.sharding.zero import clear_padding

# bf16 rounds a weight to 8 bits, and its gradients with it
TOLERANCE = {False: 1e-5, True: 5e-2}
MICRO_BATCHES = 6  # of a step, over all ranks: the same data for 1, 2 and 3 ranks


def wrap(case, model):
    """A case is an engine, and after a "-" what else is on: bf16, checkpointing, split, offload, …"""
    name, *options = case.split("-")
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    bf16, accumulation = "bf16" in options, MICRO_BATCHES // rank_and_world()[1]
    if name in ("one", "ddp"):
        return Replicated(model, bf16, accumulation)
    if name == "fsdp2":
        return Fsdp2(model, bf16, accumulation)
    changes = {}
    if "offload" in options:
        changes["zero"] = {"offload_optimizer": {"device": "cpu"}}
        if name == "zero3":
            changes["zero"]["offload_param"] = {"device": "cpu"}
    if "persistent" in options:
        changes["zero"] = {"stage3_param_persistence_threshold": 10_000}
    if "accumulate32" in options:
        changes["data_types"] = {"grad_accum_dtype": "fp32"}
    return Zero(model, bf16, accumulation, int(name[-1]), **changes)


def model_of():
    """Weights whose numbers of elements are divisible by neither 2 nor 3, and some that are."""
    return tiny_llama(
        seed=5, hidden_size=35, intermediate_size=53, num_attention_heads=5, num_key_value_heads=1, head_dim=6
    )


def split_model(case, directory):
    """The model of `model_of`, split over the ranks before it is made sparse, as transformers does it on request."""
    whole = model_of()
    if case.startswith("fsdp2"):
        if dist.get_rank() == 0:
            whole.save_pretrained(f"{directory}/model")
        dist.barrier()
        split = DistributedConfig(fsdp_size=dist.get_world_size())
        return LlamaForCausalLM.from_pretrained(f"{directory}/model", distributed_config=split)
    import deepspeed

    use_gloo_alone()
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = model_of()
    for parameter, value in zip(model.parameters(), whole.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    return model


def data(step):
    """The micro-batches of a step, token ids (MICRO_BATCHES, 2, 12); each rank trains on its share."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (MICRO_BATCHES, 2, 12), generator=generator)


def train(run, step):
    rank, world_size = rank_and_world()
    mine = data(step)[rank::world_size]
    for i, ids in enumerate(mine):
        run.backward(ids, last=i == len(mine) - 1)
    run.step()


def changed(mask, seed):
    """Another mask with as many links: a quarter of them elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    flat = mask.flatten().clone()
    links, missing = flat.nonzero().flatten(), (~flat).nonzero().flatten()
    n = min(len(links), len(missing)) // 4
    flat[links[torch.randperm(len(links), generator=generator)[:n]]] = False
    flat[missing[torch.randperm(len(missing), generator=generator)[:n]]] = True
    return flat.view_as(mask)


def check_gather(run, engine, layers):
    rank, world_size = rank_and_world()
    destinations = [(layer, i % world_size) for i, layer in enumerate(layers.values())]
    for key in (None, "exp_avg", "exp_avg_sq"):
        pieces = None if key is None else [engine.held(layer)[key] for layer in layers.values()]
        for (layer, destination), whole in zip(destinations, engine.gather(destinations, pieces), strict=True):
            expected = run.whole(layer.weight, key)
            assert (whole is None) == (destination != rank)
            if whole is not None:
                assert whole.shape == layer.mask.shape
                assert whole.equal(expected.view_as(whole)), f"gather of {key} is wrong"
                assert whole[layer.mask].count_nonzero() > 0.9 * layer.links  # not just zeros


def check_change(run, engine, layers):
    for seed, layer in enumerate(layers.values()):
        old, new = layer.mask.clone(), changed(layer.mask, seed)
        weight = layer.weight
        before = [run.whole(weight, key) for key in (None, "exp_avg", "exp_avg_sq")] + [run.working(weight)]
        layer.storage.replace(layer.matrix(new), engine)
        after = [run.whole(weight, key) for key in (None, "exp_avg", "exp_avg_sq")] + [run.working(weight)]
        assert layer.mask.equal(new)
        assert not any(layer.storage.strays(engine).values()), layer.storage.strays(engine)
        stayed = old & new
        for then, now in zip(before, after, strict=True):
            assert then[old].count_nonzero() > 0
            assert now.equal(torch.where(stayed, then, 0)), "a link that stays changed, or one that goes is not 0"


def check_stored(run, engine, layers):
    """Links leave, and come back with the weight they had."""
    for seed, layer in enumerate(layers.values()):
        weight, first = layer.weight, layer.mask.clone()
        second = changed(first, 100 + seed)
        before, working = run.whole(weight), run.working(weight)
        stored = layer.storage.stored_weights(engine)
        layer.storage.replace(layer.matrix(second), engine, stored)
        assert run.whole(weight).equal(torch.where(first & second, before, 0))
        (kept,) = engine.gather([(layer, 0)], [stored.part])
        if kept is not None:
            assert kept.equal(torch.where(first, before.to(kept.dtype), 0))
        layer.storage.replace(layer.matrix(first), engine, stored)
        assert run.whole(weight).equal(before)
        assert run.working(weight).equal(working), "the working weight does not follow"
        assert not any(layer.storage.strays(engine).values())


def check_dense_gradient(run, engine, layers, step, bf16):
    """Against a plain dense model with these weights, on all ranks' micro-batches at once."""
    rank, world_size = rank_and_world()
    named = dict(run.module.named_parameters())
    whole = {name: run.working(parameter) for name, parameter in named.items()}
    reference = model_of()
    reference.load_state_dict({name: tensor.float() for name, tensor in whole.items()})
    ids = data(step).flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        reference(input_ids=ids, labels=ids).loss.backward()
    expected = {name: reference.get_parameter(f"{name}.weight").grad for name in layers}
    for i, layer in enumerate(layers.values()):
        layer.dense_gradient = engine.dense_gradient(layer, i % world_size)
    train(run, step)
    for i, (name, layer) in enumerate(layers.items()):
        gradient, layer.dense_gradient = layer.dense_gradient.mean(), None
        assert (gradient is None) == (i % world_size != rank)
        if gradient is not None:
            off = (gradient - expected[name]).norm() / expected[name].norm()
            assert off < TOLERANCE[bf16], f"{name}: dense gradient off by {off}"
            assert gradient[~layer.mask].count_nonzero()


def check_padding(run):
    """NaN in the padding of stage 3's partitions goes, and their elements stay."""
    masters = run.optimizer.fp32_partitioned_groups_flat
    before = [(p, p.ds_tensor.clone(), held_part(p)[0].numel()) for p in run.module.parameters()]
    padded = 0
    for parameter, part, size in before:
        parameter.ds_tensor.data.view(-1)[size:] = math.nan
        padded += part.numel() - size
        group, offset, _ = run.optimizer.grad_position[run.optimizer.get_param_id(parameter)]
        masters[group].data[offset + size : offset + part.numel()] = math.nan
    masters_before = [master.clone() for master in masters]
    clear_padding(run.module, run.optimizer)
    for parameter, part, size in before:
        assert parameter.ds_tensor.view(-1)[:size].equal(part.view(-1)[:size])
        assert not parameter.ds_tensor.view(-1)[size:].any()
    for then, now in zip(masters_before, masters, strict=True):
        assert now.equal(then.nan_to_num(0))
    rank, world_size = rank_and_world()
    if rank == world_size - 1:
        assert padded > 10  # the last rank has the smaller part of a weight


def run_case(case, directory=None):
    bf16 = "bf16" in case
    model = split_model(case, directory) if "split" in case else model_of()
    sparse = sparsify(model, SparsityConfig(method="static", sparsity=0.6))
    layers = sparse.layers
    run = wrap(case, model)
    engine = engine_of(run.module, layers, run.optimizer)
    check_zeros(layers, engine)
    for step in range(2):
        train(run, step)
        check_zeros(layers, engine)
    check_gather(run, engine, layers)
    check_change(run, engine, layers)
    for step in range(2, 4):
        train(run, step)
        check_zeros(layers, engine)
    check_stored(run, engine, layers)
    check_dense_gradient(run, engine, layers, 4, bf16)
    check_change(run, engine, layers)
    if case == "zero3":
        check_padding(run)
    train(run, 5)
    check_zeros(layers, engine)
    return {name: run.whole(parameter).float() for name, parameter in model.named_parameters()}


def main(directory, *cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in cases:
        torch.manual_seed(dist.get_rank())
        weights = run_case(case, directory)
        if dist.get_rank() == 0:
            torch.save(weights, f"{directory}/{case}.pt")
            print("passed", case, flush=True)
    leave_ranks()


if __name__ == "__main__":
    main(*sys.argv[1:])
