"""What makes a process with many short runs quicker."""

import gc
import os


def be_quick():
    """To be called once everything is imported."""
    # no test loses power, and waiting for the disk takes as long as a step of these models, once for each file
    os.fsync = lambda descriptor: None
    # what the imports made stays: each Trainer collects garbage, and looking through it all took half of a short run
    gc.collect()
    gc.freeze()
