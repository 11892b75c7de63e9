"""The model that is fine-tuned: a sparse one with its links or dense, or one that was dense before."""

from transformers import PreTrainedModel

from hf_chts.config import CONFIG_NAME, SparsityConfig
from hf_chts.export.starting_weights import file_of, load_weights

# which layers have links, and how they are kept
_KEPT = (
    "sparsity", "target_modules", "exclude_modules", "allocation", "layer_sparsity", "per_head", "pattern",
    "activation_topk", "storage", "compute", "dense_mib",
)  # fmt: skip


def tuned_config(pretrained: SparsityConfig) -> SparsityConfig:
    """The config of a model that trains on with the links that it has: method static, and the same layers."""
    return SparsityConfig(method="static", **{name: getattr(pretrained, name) for name in _KEPT})


def also_sparse(source: str) -> tuple[str, ...]:
    """What else is sparse in a model, of whose zeros only a run of method topk takes care."""
    path = file_of(source, CONFIG_NAME)
    return () if path is None else tuple(SparsityConfig.load(path).also_sparse or ())


def load_to_tune(source: str, *, fill: bool, attn_implementation: str | None = None) -> PreTrainedModel:
    """A causal language model in float32, on the CPU.

    Args:
        source: an export of a sparse model, plain or packed, a checkpoint of one, or a dense model; a directory or a
            Hub id.
        fill: whether a sparse model becomes dense, with weights that start at 0 where it had no link.

    Raises:
        FileNotFoundError, ValueError: see `load_weights`; there is no such model; or `fill` is asked of a dense one, or
            of one with `activation_topk`.
    """
    try:
        path = file_of(source, CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {source} is neither a directory nor a Hub id that can be read: {error}") from error
    pretrained = None if path is None else SparsityConfig.load(path)
    sparse = pretrained is not None and not pretrained.is_dense
    if fill and not sparse:
        raise ValueError(f"zeros is 'fill', but {source} has no missing links: leave zeros out")
    if fill and pretrained is not None and pretrained.activation_topk < 1:
        raise ValueError(
            f"zeros is 'fill', and of {source} only the largest activations stay (activation_topk "
            f"{pretrained.activation_topk:g}), which a dense model would not do: leave zeros out"
        )
    config = tuned_config(pretrained) if pretrained is not None and sparse and not fill else None
    return load_weights(source, sparse=sparse, sparsity=config, attn_implementation=attn_implementation)
