"""The methods of sparse training, made of registered parts, and the choices for each field of the config.

A method's settings are those of the comparison in arXiv 2501.19107; `original` has what its own paper has instead, if
that is known for sure. It leaves out the steps between updates, which papers count in epochs (RigL's 100 steps are the
default here).
"""

from collections.abc import Iterable, Mapping

from hf_chts.topology import (  # noqa: F401 - they register
    from_weights,
    gmp,
    initial,
    largest,
    link_prediction,
    link_sampling,
    schedules,
    scores,
)
from hf_chts.topology.allocation import ALLOCATIONS
from hf_chts.topology.parts import INITIAL_TOPOLOGIES, METHODS, REGROWTH, REMOVAL, SPARSITY_SCHEDULES, register

register.method("dense", original={}, sparsity=0.0, update_until=0.0)
register.method("static", original={}, update_until=0.0)
register.method(
    "set",
    # arXiv 1707.04780: ζ = 0.3 after every epoch to the last, smallest positive and largest negative weights apart
    original={
        "allocation": "erdos_renyi",
        "removal": "magnitude_by_sign",
        "drop_fraction": 0.3,
        "drop_schedule": "constant",
        "update_until": 1.0,
    },
    # among equal scores hard and soft are the same choice, and soft draws need one pass less
    regrowth_choice="soft",
)
register.method(
    "rigl",
    # arXiv 1911.11134: ΔT = 100, α = 0.3 with cosine, T_end = 0.75, Erdős-Rényi(-Kernel)
    original={"allocation": "erdos_renyi", "drop_fraction": 0.3},
    regrowth="gradient",
)
# SMET, arXiv 2606.00888: it keeps no gradient of missing links, so that regrowth is random
register.method(
    "smet",
    regrowth_choice="soft",
    regrown_adam="per_weight_steps",
    regrown_warmup=0.2,
    rate_by_density="inverse_sqrt",
)
register.method("mest", removal="mest", regrowth_choice="soft", sparsity_schedule="elastic")
register.method("granet", regrowth="gradient", initial_sparsity=0.5, sparsity_schedule="cubic")
register.method("cht", initial_topology="bipartite_receptive_field", regrowth="ch3_l3n")

# arXiv 2501.19107 is their own paper
_CHTS = {
    "initial_topology": "bipartite_receptive_field",
    "removal_choice": "soft",
    "regrowth": "ch2_l3n",
    "regrowth_choice": "soft",
}
register.method("chts", original={}, **_CHTS)
register.method(
    "chtss", original={}, **_CHTS, initial_sparsity=0.5, sparsity_schedule="sigmoid", pruning="relative_importance"
)

# the order in which they are shown
for _name in ("dense", "static", "set", "rigl", "smet", "mest", "gmp", "granet", "cht", "chts", "chtss", "topk"):
    METHODS[_name] = METHODS.pop(_name)

# by field; registered parts may be added later
CHOICES: Mapping[str, Iterable[str]] = {
    "recipe": ("paper", "original"),
    "initial_topology": INITIAL_TOPOLOGIES,
    "initial_weights": ("model", "swi", "kaiming"),
    "allocation": ALLOCATIONS,
    "brf_degrees": ("fixed", "uniform"),
    "removal": REMOVAL,
    "removal_choice": ("hard", "soft"),
    "softness_schedule": ("linear", "adaptive"),
    "regrowth": REGROWTH,
    "regrowth_choice": ("hard", "soft"),
    "pruning": REMOVAL,
    "sparsity_schedule": SPARSITY_SCHEDULES,
    "regrown_weights": ("zero", "historical"),
    "regrown_adam": ("global_steps", "per_weight_steps"),
    "rate_by_density": ("none", "inverse_sqrt"),
    "drop_schedule": tuple(schedules.DROP_SCHEDULES),
    "storage": ("masked", "links"),
    "compute": ("dense", "sparse", "auto"),
}
