"""Which documents are held out for validation when a corpus has no split of its own for it."""

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class Holdout:
    """Whether a document belongs to the `fraction` that `seed` chooses; with `rest`, to all the others.

    The answer depends on the text alone: not on who reads it or how the files are cut, and equal texts stay together.
    """

    fraction: float
    seed: int
    rest: bool = False

    def __call__(self, text: str) -> bool:
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") < int(self.fraction * 2**64)) != self.rest

    def __str__(self) -> str:  # checkpoints keep it
        return f"{'without ' if self.rest else ''}{self.fraction} chosen by seed {self.seed}"

    def empty_error(self, documents: int) -> ValueError:
        """The error for a corpus with nothing on this side; few documents may all fall on one."""
        chosen, other = ("All", "smaller") if self.rest else ("None", "larger")
        return ValueError(
            f"{chosen} of the corpus's {documents} documents (a text file is one, equal texts go together) are held "
            f"out for validation by validation_fraction={self.fraction} and seed={self.seed}: use more documents, a "
            f"{other} validation_fraction or another seed; or put train.* and validation.* files into a folder, set "
            "dataset to the folder and validation_split to 'validation'."
        )
