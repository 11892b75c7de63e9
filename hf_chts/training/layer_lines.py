"""What is said of the layers where training begins: which are sparse, which are not, and why."""

from collections.abc import Iterable

from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.targets import matrix_shape, why_dense
from hf_chts.layers.wrappers import named_originals
from hf_chts.sharding.partitions import weight_shape


def layer_lines(sparse: SparseLayers) -> list[str]:
    """A table of the linear layers of a model, by kind, that is the end of the name and the shape."""
    model, modules = sparse.model, named_originals(sparse.model)
    reasons = why_dense(model, sparse.config, sparse.layers)
    shapes = {name: matrix_shape(modules[name]) for name in (*sparse.layers, *reasons)}
    in_layers = {id(modules[name].get_parameter("weight")) for name in shapes}
    others = sum(weight_shape(p).numel() for p in model.parameters() if id(p) not in in_layers)
    links = {name: layer.links for name, layer in sparse.layers.items()}

    header = f"layers: {len(links)} sparse with {sum(links.values()):,} links, {sparse.sparsity():.1%} sparse"
    if abs(sparse.sparsity() - sparse.config.sparsity) > 1e-3:
        header += f" and {sparse.config.sparsity:.1%} in the end"
    lines = [header]
    rows: dict[tuple[str, tuple[int, int], str], list[str]] = {}
    for name, shape in shapes.items():
        rows.setdefault((_kind(name), shape, reasons.get(name, "")), []).append(name)
    for (kind, (out, inn), reason), names in rows.items():
        what = f"dense: {reason}"
        if not reason:
            held = sum(links[name] for name in names)
            what = f"{held:,} links, {1 - held / (len(names) * out * inn):.1%} sparse"
        lines.append(f"{len(names):>8} × {kind} {out}×{inn}  {what}")
    return [*lines, f"        and {others:,} weights of no linear layer, as of embeddings and norms  dense"]


def _kind(name: str) -> str:
    """The end of a layer's name, from the last part that is no number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(_without_numbers(parts[last:]))


def _without_numbers(parts: Iterable[str]) -> list[str]:
    return [part for part in parts if not part.isdigit()] or list(parts)
