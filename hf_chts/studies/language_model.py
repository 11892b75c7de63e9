"""The LLaMA of the language study, and the dense one that has as many weights as a sparse one has links."""

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_chts.narrower import narrower
from hf_chts.studies.language_data import VOCABULARY


def block_weights(width: int, ffn: int, layers: int) -> int:
    """The weights of all projections of the blocks: q, k, v, o of (width, width), gate, up, down of (ffn, width)."""
    return layers * (4 * width * width + 3 * width * ffn)


def _other_weights(width: int, layers: int) -> int:
    """The weights outside the projections: embeddings, head and norms."""
    return 2 * VOCABULARY * width + (2 * layers + 1) * width


def narrow_dense(width: int, ffn: int, layers: int, heads: int, sparsity: float, *, whole: bool) -> tuple[int, int]:
    """Width and ffn of a dense model whose blocks have as many weights as larger ones have links at `sparsity`.

    The width is the nearest that its heads divide, each of an even width, as rotary positions take it; see `narrower`.

    Args:
        whole: count embeddings, head and norms too, in both models.

    Raises:
        ValueError: there is no such model.
    """
    links = (1 - sparsity) * block_weights(width, ffn, layers)
    wanted = links + (_other_weights(width, layers) if whole else 0)

    def count(width: int, ffn: int) -> int:
        return block_weights(width, ffn, layers) + (_other_weights(width, layers) if whole else 0)

    return narrower(width, ffn, wanted, count, heads=heads, step=2 * heads)


def build_model(
    width: int, ffn: int, layers: int, heads: int, context: int, seed: int, *, bf16: bool
) -> LlamaForCausalLM:
    """A dense LLaMA over bytes with weights of its own distribution, drawn in fp32 and held in fp32 or bf16."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return model.bfloat16() if bf16 else model
