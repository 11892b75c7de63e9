"""Checkpoints: the topology beside the weights, the seal of a complete checkpoint, and the run it belongs to."""

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
