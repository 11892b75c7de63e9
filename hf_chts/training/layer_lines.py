"""The table of a model's layers that is printed when training begins: which are sparse, which are not, and why."""

from hf_chts.layers.sparse_layers import SparseLayers
from hf_chts.layers.targets import matrix_shape, why_dense
from hf_chts.layers.wrappers import named_originals
from hf_chts.names import last_part
from hf_chts.sharding.partitions import weight_shape
from hf_chts.text_table import text_table


def layer_lines(sparse: SparseLayers) -> list[str]:
    """A line for all linear layers of a model with the same last part of the name and the same shape."""
    model, modules = sparse.model, named_originals(sparse.model)
    reasons = why_dense(model, sparse.config, sparse.layers)
    shapes = {name: matrix_shape(modules[name]) for name in (*sparse.layers, *reasons)}
    in_layers = {id(modules[name].get_parameter("weight")) for name in shapes}
    others = sum(weight_shape(p).numel() for p in model.parameters() if id(p) not in in_layers)
    links = {name: layer.links for name, layer in sparse.layers.items()}

    header = f"layers: {len(links)} sparse with {sum(links.values()):,} links, {sparse.sparsity():.1%} sparse"
    if abs(sparse.sparsity() - sparse.config.sparsity) > 1e-3:
        header += f" and {sparse.config.sparsity:.1%} in the end"
    alike: dict[tuple[str, tuple[int, int], str], list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault((last_part(name), shape, reasons.get(name, "")), []).append(name)
    rows = []
    for (kind, (rows_out, columns_in), reason), names in alike.items():
        what = f"dense: {reason}"
        if not reason:
            total = sum(links[name] for name in names)
            what = f"{total:,} links, {1 - total / (len(names) * rows_out * columns_in):.1%} sparse"
        rows.append([f"{len(names)} ×", kind, f"{rows_out}×{columns_in}", what])
    table = [f"      {line}" for line in text_table(rows, right=[0])]
    return [header, *table, f"      and {others:,} weights outside linear layers, such as embeddings and norms: dense"]
