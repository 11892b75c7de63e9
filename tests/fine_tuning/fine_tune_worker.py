"""`hf-chts fine-tune` on the launcher's engine: FSDP2 on the CPU too, where accelerate leaves it off."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from cpu_engines import allow_fsdp, use_gloo_alone

from hf_chts.commands import end_rank, fine_tune
from hf_chts.sharding.detect import engine_of


class Trainer(fine_tune.SparseSFTTrainer):
    def __init__(self, **options):
        allow_fsdp()
        super().__init__(**options)

    def evaluate(self, *args, **kwargs):
        engine = engine_of(self.sparse.model, self.sparse.layers, self.optimizer)  # the ranks talk
        if self.is_world_process_zero():
            print("engine:", type(engine).__name__)
        return super().evaluate(*args, **kwargs)


if __name__ == "__main__":
    use_gloo_alone()
    fine_tune.SparseSFTTrainer = Trainer
    fine_tune.fine_tune(sys.argv[1:], program="fine-tune")
    end_rank()
