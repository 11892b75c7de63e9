"""Which documents are set aside for validation when a corpus has no split of its own for it."""

from dataclasses import dataclass
from hashlib import blake2b


@dataclass(frozen=True)
class ByText:
    """Whether a document belongs to the `fraction` that `seed` chooses, or with `rest` to what that leaves.

    A function of its text alone: so it does not depend on who reads it, on how it is read or on how the files are cut,
    and equal texts stay together.
    """

    fraction: float
    seed: int
    rest: bool = False

    def __call__(self, text: str) -> bool:
        key = self.seed.to_bytes(8, "little", signed=True)
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        return (int.from_bytes(digest, "little") < int(self.fraction * 2**64)) != self.rest

    def __str__(self) -> str:
        return f"{'without ' if self.rest else ''}{self.fraction} chosen by seed {self.seed}"

    def chose_nothing(self, documents: int) -> ValueError:
        """The error for a corpus of which nothing belongs here; few documents may all fall on one side."""
        chosen, other = ("All", "smaller") if self.rest else ("None", "larger")
        return ValueError(
            f"{chosen} of the corpus's {documents} documents (a text file is one, equal texts go together) are held "
            f"out for validation by validation_fraction={self.fraction} and seed={self.seed}: use more documents, a "
            f"{other} validation_fraction or another seed; or put train.* and validation.* files into a folder, set "
            "dataset to the folder and validation_split to 'validation'."
        )
