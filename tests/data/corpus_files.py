"""A corpus's files in every format, written without the package."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

# every format, and every compression at least once
NAMES = [
    "c.parquet", "c.jsonl", "c.json", "c.csv", "c.tsv", "c.arrow", "c.feather.arrow", "c.tar",
    "c.jsonl.gz", "c.jsonl.zst", "c.ndjson.bz2", "c.json.xz", "c.json.zst", "c.csv.gz", "c.tsv.zst", "c.tar.gz",
]  # fmt: skip


def zstd(data):
    """Two frames, as the compressors that work in parallel write them."""
    return b"".join(
        pa.Codec("zstd").compress(part, asbytes=True) for part in (data[: len(data) // 2], data[len(data) // 2 :])
    )


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def json_rows(texts, column="text"):
    return [json.dumps({"id": i, column: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]


def table(texts, column="text"):
    return pa.table({"id": pa.array(range(len(texts)), pa.int64()), column: pa.array(texts, pa.string())})


def contents(form, texts, column="text"):
    """The bytes of a file of that format, uncompressed; a text of None is null where the format has it, else empty."""
    file = io.BytesIO()
    if form == "parquet":
        pq.write_table(table(texts, column), file, row_group_size=7, compression="none", write_page_checksum=True)
    elif form == "arrow":
        with pa.ipc.new_stream(file, table([], column).schema) as writer:
            writer.write_table(table(texts, column), max_chunksize=9)
    elif form == "feather":
        with pa.ipc.new_file(file, table([], column).schema) as writer:
            writer.write_table(table(texts, column), max_chunksize=9)
    elif form in ("csv", "tsv"):
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, delimiter="," if form == "csv" else "\t")
        writer.writerows([("id", column), *enumerate(texts)])
        file.write(lines.getvalue().encode())
    elif form == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            for index, text in enumerate(texts):
                ending = "txt" if column == "text" and index % 2 else column
                for name, data in ((f"a/{index:05}.{ending}", (text or "").encode()), (f"a/{index:05}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    elif form == "json":
        file.write(f"[{', '.join(json_rows(texts, column))}]".encode())
    elif form == "text":
        file.write("".join(texts).encode())
    else:
        file.write("".join(f"{row}\n" for row in json_rows(texts, column)).encode())
    return file.getvalue()


def form_of(path):
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESS else path.name
    if name.endswith(".feather.arrow"):
        return "feather"
    ending = name.rpartition(".")[2]
    return {"jsonl": "lines", "ndjson": "lines", "txt": "text"}.get(ending, ending)


def write_file(path, texts, column="text"):
    """One file of the format and compression that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = contents(form_of(path), texts, column)
    path.write_bytes(COMPRESS[path.suffix](data) if path.suffix in COMPRESS else data)
    return path
