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


def draw_nothing(patch):
    """Leave out the figure and the report of runs in this process, which take as long as their training."""
    patch.setattr("hf_chts.commands.train.draw", lambda trainer, path: None)
    patch.setattr("hf_chts.commands.train.report_on", lambda output: None)
