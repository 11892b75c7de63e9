"""A circuit: the neurons and channels of a sparse model that a prompt makes most active, and their strongest links.

It is found for the last token of the prompt: for each attention and each MLP some of the neurons that add most to the
residual stream, the links by which they read it, and those by which they write to it. `trace` writes it beside the
records of a run, where the report looks for it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from hf_chts.checkpoint.run_folder import last_sealed
from hf_chts.export.loading import load_sparse
from hf_chts.files.atomic import write_whole
from hf_chts.files.reading import read_json
from hf_chts.layers.neurons import neuron_dimension
from hf_chts.records.run_record import RECORD_DIR
from hf_chts.sparse_model import SparsityHandle

CIRCUIT_NAME = "circuit.json"
FORMAT = "hf_chts circuit, 1"
NEURONS = 8  # of each attention and MLP
LINKS = 3  # that are shown of a neuron in each layer that it has links in


@dataclass(frozen=True)
class CircuitLink:
    """A link between a channel of the residual stream and a neuron.

    Attributes:
        layer: its name in the model.
        channel, neuron: their numbers.
        reads: whether the neuron reads the channel; else it writes to it.
        weight: of the link.
        effect: |weight · activation|, the activation being that of the side that the link starts from.
    """

    layer: str
    channel: int
    neuron: int
    reads: bool
    weight: float
    effect: float


@dataclass(frozen=True)
class Circuit:
    """What a prompt makes active.

    Attributes:
        prompt: the text.
        predicted: the token that the model finds likeliest after it.
        step: of the checkpoint; 0 if it is not known.
        channels: of the residual stream.
        parts: the attentions and MLPs in the model's order, by the name of the module, with their number of neurons.
        active: the neurons of each part that are not 0.
        links: those that are shown.
    """

    prompt: str
    predicted: str
    step: int
    channels: int
    parts: dict[str, int]
    active: dict[str, int]
    links: list[CircuitLink]


def write_circuit(run_dir: str | Path, prompt: str) -> Path:
    """Trace a prompt through the last checkpoint of a run, else its export, and write the circuit beside its records.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no checkpoint and no export.
        ValueError: the model is dense, no layer of it writes to the residual stream, or the prompt is empty.
    """
    run_dir = Path(run_dir)
    source = last_sealed(run_dir) or run_dir / "export"
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} has no whole checkpoint and no export to trace a prompt through")
    model = load_sparse(source).eval()
    sparse = SparsityHandle.of(model)
    assert sparse is not None
    tokenizer = AutoTokenizer.from_pretrained(source)
    state = Path(source) / "trainer_state.json"
    step = int(read_json(state).get("global_step", 0)) if state.is_file() else 0
    circuit = trace(model, sparse, tokenizer, prompt, step)
    path = run_dir / RECORD_DIR / CIRCUIT_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, **asdict(circuit)}, indent=1) + "\n")
    return path


def read_circuit(directory: Path) -> Circuit | None:
    """The circuit in a folder of records; None if there is none of this format."""
    path = directory / CIRCUIT_NAME
    values = read_json(path) if path.is_file() else {}
    if values.pop("format", None) != FORMAT:
        return None
    return Circuit(**{**values, "links": [CircuitLink(**link) for link in values["links"]]})


@torch.no_grad()
def trace(model: nn.Module, sparse: SparsityHandle, tokenizer: Any, prompt: str, step: int = 0) -> Circuit:
    """The circuit of a prompt; see `Circuit`.

    Raises:
        ValueError: see `write_circuit`.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, layer in sparse.layers.items():
        parts.setdefault(name.rpartition(".")[0], {})[name] = layer
    # layers that write, each with those that read into its neurons; q and k only decide where attention looks
    ends = {part: next((n for n in layers if neuron_dimension(n) == 1), None) for part, layers in parts.items()}
    ends = {part: end for part, end in ends.items() if end is not None}
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ends or not ids.numel():
        problem = "no sparse layer writes to the residual stream" if not ends else f"the prompt {prompt!r} has no token"
        raise ValueError(f"a circuit cannot be traced: {problem}. Give a sparse LLaMA-like model, and some text")
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given: inputs.__setitem__(name, given[0][0].detach().float())

    # hooks of AbsTopK on these inputs were registered before, so that what they left is seen
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in sparse.layers.items()]
    try:
        logits = model(input_ids=ids).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    links: list[CircuitLink] = []
    sizes, active = {}, {}
    for part, end in ends.items():
        assert end is not None
        writer, values = sparse.layers[end], inputs[end][-1]
        weight = _matrix(writer)
        sizes[part], active[part] = len(values), int(values.count_nonzero())
        strength = values.abs() * weight.abs().sum(0)
        chosen = [int(n) for n in strength.topk(min(NEURONS, len(values))).indices if strength[n] > 0]
        for neuron in chosen:
            links += _strongest(end, weight[:, neuron], values[neuron].abs(), neuron, reads=False)
            for name, layer in parts[part].items():
                row = _row(neuron, len(values), layer.storage.shape[0], model)
                if name == end or name.endswith(("q_proj", "k_proj")) or row is None:
                    continue
                # an attention reads all tokens, an MLP the last one
                given = inputs[name]
                seen = given.abs().mean(0) if "attn" in part else given[-1].abs()
                links += _strongest(name, _matrix(layer)[row], seen, neuron, reads=True)
    channels = sparse.layers[next(iter(ends.values())) or ""].storage.shape[0]
    return Circuit(prompt, tokenizer.decode([int(logits.argmax())]), step, channels, sizes, active, links)


def _matrix(layer: Any) -> Tensor:
    return layer.matrix(layer.weight.detach()).float()


def _row(neuron: int, neurons: int, outputs: int, model: Any) -> int | None:
    """The output of a reading layer that a neuron is: its own number, or with fewer heads of values its group's."""
    if outputs == neurons:
        return neuron
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if outputs % size or neurons % outputs:
        return None
    head, place = divmod(neuron, size)
    return head // (neurons // outputs) * size + place


def _strongest(name: str, weights: Tensor, activations: Tensor, neuron: int, *, reads: bool) -> list[CircuitLink]:
    effects = weights.abs() * activations
    found = effects.topk(min(LINKS, len(effects))).indices.tolist()
    return [
        CircuitLink(name, n, neuron, reads, round(float(weights[n]), 6), round(float(effects[n]), 6))
        for n in found
        if effects[n] > 0
    ]


def words(circuit: Circuit) -> str:
    """What the circuit shows, for those who do not see it."""
    shown: Mapping[str, int] = {
        part: len({link.neuron for link in circuit.links if link.layer.rpartition(".")[0] == part})
        for part in circuit.parts
    }
    counts = "; ".join(
        f"{part} shows {shown[part]} of {circuit.active[part]} active neurons of {circuit.parts[part]}"
        for part in circuit.parts
    )
    return f"After {circuit.prompt!r} the model expects {circuit.predicted!r}. {len(circuit.links)} links: {counts}."
