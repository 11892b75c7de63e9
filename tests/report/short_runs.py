"""Runs to report on: trained for some steps, with evaluations that are made up, so that their figures are known."""

import json

from cases import trainer

BITS = {"chtss": 2.2512, "set": 2.3034, "dense": 2.1987}
LOSSES = {"chtss": 4.5411, "set": 4.6222, "dense": 4.4018}


def trained(directory, case):
    """The directory of a run of 24 steps, whose last evaluation gave LOSSES and BITS."""
    run = trainer(directory, case, save_steps=12)
    run.train()
    run.save_state()
    path = directory / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] += [
        {"step": 12, "eval_loss": 6.125, "eval_bits_per_byte": 3.0625},
        {"step": 24, "eval_loss": LOSSES[case], "eval_bits_per_byte": BITS[case]},
    ]
    path.write_text(json.dumps(state))
    return directory


def log_of(directory):
    return json.loads((directory / "trainer_state.json").read_text())["log_history"]
