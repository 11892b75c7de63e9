"""Network science on bipartite layers: boolean (out_features, in_features) tensors in, tensors out.

Imports torch and numpy only. A mask is laid out like `torch.nn.Linear.weight`; True is a link.
"""
