"""Hub ids through a local stub of the Hub: what `datasets` asks for, answered from a dict of files."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_chts.data import load_source

SHA = "0123456789abcdef0123456789abcdef01234567"


def jsonl(texts):
    return gzip.compress("".join(json.dumps({"text": t, "url": "-"}) + "\n" for t in texts).encode())


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


# laid out as allenai/c4: configurations and splits are named in the card
REPOSITORIES = {
    "allenai/c4": {
        "README.md": b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: de
  data_files:
  - split: train
    path: de/*.json.gz
---
""",
        "en/c4-train.00000-of-00002.json.gz": jsonl(["one", "two"]),
        "en/c4-train.00001-of-00002.json.gz": jsonl(["three"]),
        "en/c4-validation.00000-of-00001.json.gz": jsonl(["held out"]),
        "de/c4-train.json.gz": jsonl(["eins"]),
    },
    "Skylion007/openwebtext": {"README.md": b"", "plain_text/train-00000-of-00001.parquet": parquet(["web text"])},
    "some/lines": {"README.md": b"", "train.txt": b"a line\nanother\n"},
}


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/")
        path = path.removeprefix("/api").removeprefix("/datasets/")
        if path == "openwebtext":  # an old name without a namespace
            return self.answer(status=307, Location="/api/datasets/Skylion007/openwebtext")
        repository = next((name for name in REPOSITORIES if path.startswith(f"{name}/") or path == name), None)
        if repository is None:
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        files = REPOSITORIES[repository]
        action, _, rest = path[len(repository) :].strip("/").partition("/")
        _, _, name = rest.partition("/")  # after the revision
        if action == "resolve" and name in files and not api:
            return self.answer(
                files[name], ETag=f'"{hash(name):x}"', X_Repo_Commit=SHA, Content_Type="application/octet-stream"
            )
        if action == "tree" and any(file.startswith(name) for file in files):
            return self.answer(self.entries(files, name, "recursive=True" in self.path))
        if action == "paths-info":
            wanted = json.loads(body)["paths"]
            return self.answer([entry for entry in self.entries(files, "", True) if entry["path"] in wanted])
        if api and action in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": repository, "sha": SHA, "siblings": siblings, "tags": []})
        return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)

    do_HEAD = do_POST = do_GET

    def entries(self, files, folder, recursive):
        prefix = f"{folder}/" if folder else ""
        inside = [name for name in files if name.startswith(prefix)]
        found = {name: {"type": "file", "path": name, "oid": "0" * 40, "size": len(files[name])} for name in inside}
        for name in inside:
            parts = name.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                path = "/".join(parts[:depth])
                if path != folder and path.startswith(prefix):
                    found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return [e for e in found.values() if recursive or "/" not in e["path"][len(prefix) :]]

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from hf_chts.data.corpora import load_source

for dataset, split, options in json.loads(sys.argv[1]):
    try:
        source = load_source(dataset, split, **options)
        read = [list(source.read(shard)) for shard in range(source.num_shards)]
        for shard, rows in enumerate(read):
            assert list(source.read(shard, start=rows[0][1])) == rows[1:]
        names = [file.name for file in getattr(source, "files", [])]
        found = [type(source).__name__, [text for rows in read for text, _ in rows], names]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    print("FOUND " + json.dumps(found))
"""


def load(hub, cases, folder, **variables):
    """What `load_source` gives for each case, in a process of its own: the endpoint is read at import."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        **{"HF_ENDPOINT": hub, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        **variables,
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]


CASES = [
    ("allenai/c4", "train", {"config": "en"}),
    ("openwebtext", "train", {}),
    ("some/lines", "train", {}),
    ("allenai/c4", "dev", {"config": "en"}),
    ("allenai/c4", "validation", {"config": "en"}),
    ("allenai/c4", "train", {"config": "de"}),
    ("allenai/c4", "train", {"config": "en", "text_column": "content"}),
    ("allenai/c4", "train", {"config": "fr"}),
    ("nobody/nothing", "train", {}),
]


def test_hub(hub, tmp_path):
    streamed, downloaded = (
        [(dataset, split, {**options, "download": download}) for dataset, split, options in CASES]
        for download in (False, True)
    )
    found = load(hub, streamed + downloaded, tmp_path)
    for c4, web, lines, split, held_out, german, column, config, missing in (found[:9], found[9:]):
        # the paths of files that can be read from anywhere have the revision in them
        first = f"hf://datasets/allenai/c4@{SHA}/en/c4-train.00000-of-00002.json.gz"
        assert (c4[0], c4[1], c4[2][0]) == ("FileSource", ["one", "two", "three"], first)
        assert web[:2] == ["FileSource", ["web text"]]
        assert lines[:2] == ["DatasetSource", ["a line", "another"]]  # `datasets` makes documents of lines
        assert "Split 'dev' of dataset 'allenai/c4' (dataset_config 'en')" in split
        assert held_out[:2] == ["FileSource", ["held out"]]
        assert german[:2] == ["FileSource", ["eins"]]
        assert "c4-train.00000-of-00002.json.gz, line 1: no column 'content', only text, url" in column
        assert "dataset_config 'fr'" in config
        assert "'de'" in config  # the configurations that there are
        assert "'nobody/nothing'" in missing
    # what was downloaded can be used without a network
    *offline, never = load(hub, downloaded[:4], tmp_path, HF_HUB_OFFLINE="1")
    assert [texts for _, texts, _ in offline] == [texts for _, texts, _ in found[9:12]]
    assert "Split 'dev' of dataset 'allenai/c4' (dataset_config 'en') could not be loaded" in never


@pytest.mark.parametrize(("dataset", "download"), [("allenai/c4", False), ("openwebtext", True)])
def test_no_network(monkeypatch, dataset, download):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"Split 'train' of dataset '{dataset}'") as raised:
        load_source(dataset, config="en", download=download)
    assert "Couldn't reach" in str(raised.value) or "offline mode" in str(raised.value)
    assert "local file or folder, or to 'embedded'" in str(raised.value)
