"""What a checkpoint is: the topology beside the weights, the seal that tells whether it is complete, and its run."""

from hf_chts.checkpoint.topology_state import (
    HISTORY_NAME,
    MASKS_NAME,
    MaskFile,
    TopologyState,
    load_masks,
    load_topology,
    mask_metadata,
    save_masks,
    save_topology,
    verify_fits,
    with_original_names,
)

__all__ = [
    "HISTORY_NAME",
    "MASKS_NAME",
    "MaskFile",
    "TopologyState",
    "load_masks",
    "load_topology",
    "mask_metadata",
    "save_masks",
    "save_topology",
    "verify_fits",
    "with_original_names",
]
