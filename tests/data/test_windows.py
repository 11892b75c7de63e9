"""Which reader gets which documents, checked by brute force: none is lost and none comes twice."""

from collections import Counter
from itertools import islice

import datasets
import pytest

from hf_chts.data import windows as windows_module
from hf_chts.data.holdout import Holdout
from hf_chts.data.sources import DatasetSource, pieces
from hf_chts.data.windows import Place, Shuffle, pieces_of_reader, read_ahead, windows


class Shards:
    """Documents in shards of given sizes; `reads` has the reads: (shard, first row)."""

    identity: dict = {}  # noqa: RUF012
    cache_key = None

    def __init__(self, *sizes):
        self.shards = [[f"{shard}.{row}" for row in range(size)] for shard, size in enumerate(sizes)]
        self.reads = []

    num_shards = property(lambda self: len(self.shards))

    @property
    def documents(self):
        return [text for shard in self.shards for text in shard]

    def read(self, shard, part=0, parts=1, start=None):
        rows = self.shards[shard]
        first, last = max(len(rows) * part // parts, start or 0), len(rows) * (part + 1) // parts
        self.reads.append((shard, first))
        for row in range(first, last):
            yield rows[row], row + 1


SIZES = [(40,), (1, 2, 3), (0, 9, 0), (5, 30, 1, 17), (3,) * 20, (7,) * 40]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("readers", [1, 2, 3, 6])
@pytest.mark.parametrize("buffer", [0, 1, 4, 1000])
def test_an_epoch_is_every_document_once(sizes, readers, buffer):
    source = Shards(*sizes)
    orders = []
    for epoch in range(2):
        read = [
            [text for _, texts, _ in
             windows(source, Shuffle(buffer, 5), r, readers, place=Place(epoch), epochs=epoch + 1)
             for text in texts]
            for r in range(readers)
        ]  # fmt: skip
        assert Counter(text for texts in read for text in texts) == Counter(source.documents)
        orders.append(read)
    if not buffer:
        assert orders[0] == orders[1]
        if readers == 1:
            assert orders[0] == [source.documents]
    elif buffer > 1 and sum(sizes) > 20:
        assert orders[0] != orders[1]


@pytest.mark.parametrize(("shards", "readers"), [(1, 4), (3, 2), (5, 4), (6, 4), (80, 32), (31, 4), (1024, 64)])
def test_shares_are_about_as_large(shards, readers):
    """Shards of one size: the largest share is at most an eighth above the mean."""
    dealt = [sum(1 / piece.parts for piece in pieces(shards, readers)[r::readers]) for r in range(readers)]
    assert sum(dealt) == pytest.approx(shards)
    assert max(dealt) <= 1.125 * shards / readers
    every = {(piece.shard, piece.part) for piece in pieces(shards, readers)}
    assert every == {(piece.shard, part) for piece in pieces(shards, readers) for part in range(piece.parts)}


def test_going_on_at_any_window():
    source = Shards(5, 30, 1, 17)
    shuffle = Shuffle(4, 9)
    whole = list(islice(windows(source, shuffle, 1, 3), 20))
    assert whole[-1][0].epoch > 2
    for index, (place, _, _) in enumerate(whole):
        source.reads.clear()
        again = list(islice(windows(source, shuffle, 1, 3, place=place), 20 - index))
        assert again == whole[index:]
        piece = pieces_of_reader(source, shuffle, 1, 3, place.epoch)[place.piece]
        first = max(len(source.shards[piece.shard]) * piece.part // piece.parts, place.position or 0)
        assert source.reads[0] == (piece.shard, first)  # nothing before the window


@pytest.mark.parametrize("changed", [Shuffle(8, 1), Shuffle(8, 0, restart=3), Shuffle(8, -1), Shuffle(9, 0)])
def test_other_orders(changed):
    source = Shards(40, 40)
    first = [text for _, texts, _ in islice(windows(source, Shuffle(8, 0), 0, 2), 4) for text in texts]
    assert [text for _, texts, _ in islice(windows(source, changed, 0, 2), 4) for text in texts] != first


def test_a_window_mixes_documents_of_several_files():
    source = Shards(*[3] * 10)
    _, texts, _ = next(windows(source, Shuffle(12, 0), 0, 1))
    assert len({text.split(".")[0] for text in texts}) >= 4
    assert texts != sorted(texts)


def test_windows_of_long_documents_are_smaller(monkeypatch):
    monkeypatch.setattr(windows_module, "_WINDOW_CHARACTERS", 10)
    sizes = [len(texts) for _, texts, _ in windows(Shards(30), Shuffle(1000, 0), 0, 1, epochs=1)]
    # "0.0" … "0.9" are 3 characters, later ones 4
    assert sizes == [4, 4, *[3] * 7, 1]


def test_no_documents_for_a_reader():
    source = Shards(3)
    with pytest.raises(ValueError, match=r"reader 0 of 2 .* found no documents in 100 epochs"):
        next(windows(source, Shuffle(8, 0), 0, 2, keep=lambda text: False))
    # fewer documents than readers: each gets some in some epoch
    for reader in range(8):
        assert next(windows(source, Shuffle(8, 0), reader, 8))[1]


def test_holdout_is_a_fraction_of_any_texts():
    texts = [f"document {i}" for i in range(10_000)]
    chosen = list(map(Holdout(0.05, 3), texts))
    assert abs(sum(chosen) - 500) < 5 * (10_000 * 0.05 * 0.95) ** 0.5
    assert [not c for c in chosen] == list(map(Holdout(0.05, 3, rest=True), texts))
    other = list(map(Holdout(0.05, 4), texts))
    assert sum(a and b for a, b in zip(chosen, other, strict=True)) < 60  # 25 by chance
    assert str(Holdout(0.05, 4, rest=True)) == "without 0.05 chosen by seed 4"


def test_read_ahead_is_one_ahead_and_hands_errors_on():
    asked = []

    def items():
        for number in range(5):
            asked.append(number)
            if number == 3:
                raise ValueError("the fourth")
            yield number

    reading = read_ahead(items())
    assert next(reading) == 0
    assert next(reading) == 1
    assert asked[:3] in ([0, 1], [0, 1, 2])
    assert next(reading) == 2
    with pytest.raises(ValueError, match="the fourth"):
        next(reading)
    abandoned = read_ahead(iter(range(9)))
    assert next(abandoned) == 0
    abandoned.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_parts(streaming):
    dataset = datasets.Dataset.from_dict({"content": [str(i) for i in range(50)], "other": range(50)})
    source = DatasetSource(dataset.to_iterable_dataset(3) if streaming else dataset, "content")
    for parts in (1, 4):
        whole = [list(source.read(shard, part, parts)) for shard in range(source.num_shards) for part in range(parts)]
        assert sorted(int(text) for rows in whole for text, _ in rows) == list(range(50))
    last = list(source.read(source.num_shards - 1, 1, 4))
    for taken, (_, position) in enumerate(last, 1):
        assert list(source.read(source.num_shards - 1, 1, 4, position)) == last[taken:]
