"""The methods of sparse training as compositions of the same parts, and the choices there are for each part.

The settings of `METHODS` are those that arXiv 2501.19107 compares all methods with; `ORIGINAL` has what a method's own
paper has instead.
"""

from typing import Any

# What a field is where neither the run nor its method says anything
DEFAULTS: dict[str, Any] = {
    "sparsity": 0.9,
    "allocation": "uniform",
    "initial_topology": "erdos_renyi",
    "removal": "magnitude",
    "removal_choice": "hard",
    "regrowth": "random",
    "regrowth_choice": "hard",
    "pruning": "magnitude",
    "update_until": 0.75,
    "drop_fraction": 0.1,
    "drop_schedule": "cosine",
    "sparsity_schedule": "constant",
    "regrown_weights": "zero",
}

# What each method is made of; what a method does not name is the default above or the field's own. To add
# a method, add a row here and, where no part exists for it yet, one function in hf_chts/topology.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": 0.0, "update_until": 0.0},
    "static": {"update_until": 0.0},
    # among equal scores hard and soft are the same choice, and soft draws need one pass less
    "set": {"regrowth_choice": "soft"},
    "rigl": {"regrowth": "gradient"},
    "mest": {"removal": "mest", "regrowth_choice": "soft", "sparsity_schedule": "elastic"},
    "gmp": {
        "initial_sparsity": 0.5,
        "sparsity_schedule": "cubic",
        "regrowth": "stored",
        "regrown_weights": "historical",
    },
    "granet": {"regrowth": "gradient", "initial_sparsity": 0.5, "sparsity_schedule": "cubic"},
    "cht": {"initial_topology": "bipartite_receptive_field", "regrowth": "ch3_l3n"},
    "chts": {
        "initial_topology": "bipartite_receptive_field",
        "removal_choice": "soft",
        "regrowth": "ch2_l3n",
        "regrowth_choice": "soft",
    },
    "chtss": {
        "initial_topology": "bipartite_receptive_field",
        "removal_choice": "soft",
        "regrowth": "ch2_l3n",
        "regrowth_choice": "soft",
        "initial_sparsity": 0.5,
        "sparsity_schedule": "sigmoid",
        "pruning": "relative_importance",
    },
}

# What a method's own paper has instead, where that is known for sure; the number of steps between updates is not among
# it, which papers count in epochs (RigL: 100 steps, as here). Methods without a row have no recipe "original".
ORIGINAL: dict[str, dict[str, Any]] = {
    "dense": {},
    "static": {},
    # arXiv 1707.04780: ζ = 0.3 after every epoch to the last, smallest positive and largest negative weights apart
    "set": {
        "allocation": "erdos_renyi",
        "removal": "magnitude_by_sign",
        "drop_fraction": 0.3,
        "drop_schedule": "constant",
        "update_until": 1.0,
    },
    # arXiv 1911.11134: ΔT = 100, α = 0.3 with cosine, T_end = 0.75, Erdős-Rényi(-Kernel)
    "rigl": {"allocation": "erdos_renyi", "drop_fraction": 0.3},
    "gmp": {"initial_sparsity": 0.0},  # arXiv 1710.01878: from a dense model
    # arXiv 2501.19107 is their own paper
    "chts": {},
    "chtss": {},
}

CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": ("comparison", "original"),
    "initial_topology": (
        "erdos_renyi",
        "bipartite_receptive_field",
        "bipartite_small_world",
        "bipartite_scale_free",
        "correlated",
    ),
    "allocation": ("uniform", "erdos_renyi", "global"),
    "brf_degrees": ("fixed", "uniform"),
    "removal": ("magnitude", "magnitude_by_sign", "relative_importance", "mest"),
    "removal_choice": ("hard", "soft"),
    "softness_schedule": ("linear", "adaptive"),
    "regrowth": ("random", "gradient", "ch2_l3n", "ch3_l3n", "ch3_1_l3n", "stored"),
    "regrowth_choice": ("hard", "soft"),
    "pruning": ("magnitude", "relative_importance"),
    "sparsity_schedule": ("constant", "linear", "cubic", "sigmoid", "elastic"),
    "regrown_weights": ("zero", "historical"),
    "regrown_adam": ("global_steps", "per_weight_steps"),
    "drop_schedule": ("constant", "linear", "cosine"),
}
