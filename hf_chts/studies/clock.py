"""Seconds of training, without evaluation, over all attempts of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from hf_chts.studies.memory import training_begins


class Clock:
    """Counts while `running`; its state goes into checkpoints.

    Attributes:
        seconds: of the wall clock.
        processor_seconds: of all threads of this process. Others on the machine, which share its caches and its memory,
            still make equal work take up to twice as many.
    """

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        training_begins()
        wall, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - wall
            self.processor_seconds += time.process_time() - processor

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "processor_seconds": self.processor_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.processor_seconds = state["seconds"], state["processor_seconds"]
