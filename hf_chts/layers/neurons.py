"""Which side of a layer's weight counts neurons, told by the layer's name."""

# layers whose inputs are neurons or attention channels, and whose outputs are added to the residual stream
WRITES = (
    "o_proj", "down_proj", "out_proj", "c_proj", "wo", "w2", "fc2", "fc_out", "fc_o", "dense_4h_to_h",
    "attention.dense", "self_attention.dense", "output.dense",
)  # fmt: skip


def neuron_dimension(name: str) -> int | None:
    """The dimension of a weight (out, in) that counts the neurons of an MLP or the channels of an attention.

    Returns:
        0, the outputs, of layers that read the residual stream, such as q_proj and up_proj; 1, the inputs, of layers
        that write to it, such as o_proj and down_proj; None for heads, whose sides are tokens and the residual stream.
    """
    last = name.rpartition(".")[2]
    if last in ("lm_head", "embed_out", "score", "classifier"):
        return None
    return 1 if any(name == ending or name.endswith(f".{ending}") for ending in WRITES) else 0
