"""A local server that speaks as much of the Hub's HTTP as pushes and pulls of models need.

    with HubStub() as hub:
        hub.fail("PUT /lfs/", status=500, on={2})  # the second upload of a large file
        run a client with hub.environment(home)
        hub.files("me/model")  # {path: bytes} of the last commit

Repositories, branches and commits are kept in memory, as the Hub keeps them: large files are uploaded first, and
nothing is in the repository before the commit that names them.
"""

import base64
import hashlib
import io
import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub

from hf_chts.export import hub_errors

# the Hub stores these apart from git, by the hash of their contents
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, bytes]]]]  # of commits: sha, message, files

    def at(self, revision):
        """(sha, files) of a branch or commit; None if there is none."""
        commits = self.branches.get(revision)
        if commits:
            return commits[-1][0], commits[-1][2]
        found = [commit for branch in self.branches.values() for commit in branch if commit[0] == revision]
        return (found[0][0], found[0][2]) if found else None


@dataclass
class Failure:
    """What goes wrong with requests whose "METHOD /path" matches: a status, or (None) a cut connection."""

    pattern: str
    status: int | None
    on: set[int] | None  # numbers of the matching requests, from 1; None: all of them
    headers: dict[str, str]
    done: bool = False  # what was asked for is done, and only the answer is lost
    seen: int = 0


@dataclass
class HubStub:
    """The server; also the test's handle of what it holds and was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    requests: list[str] = field(default_factory=list)  # "METHOD /path"
    failures: list[Failure] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    open: threading.Event = field(default_factory=threading.Event)  # uploads of large files wait for it

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.open.set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.open.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=WRITER):
        """The environment of a client: the endpoint is read when huggingface_hub is imported."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "DISABLE_TELEMETRY": "1"}
        return own | settings | ({"HF_TOKEN": token} if token else {})

    def connect(self, monkeypatch, token=WRITER):
        """Have this process push here; returns the list of the seconds that it would have waited."""
        waits = []
        clock = SimpleNamespace(**{**vars(time), "sleep": waits.append})
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
        monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
        monkeypatch.setattr(hub_errors, "time", clock)
        monkeypatch.setenv("HF_TOKEN", token)
        return waits

    def fail(self, pattern, *, status=None, on=None, done=False, **headers):
        headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        self.failures.append(Failure(pattern, status, on, headers, done))

    def create(self, repo_id, files=None, *, private=False):
        self.repositories[repo_id] = Repository(private, {})
        self.commit(repo_id, "main", "initial commit", {".gitattributes": b"", **(files or {})})

    def commit(self, repo_id, branch, message, files):
        with self.lock:
            commits = self.repositories[repo_id].branches.setdefault(branch, [])
            sha = hashlib.sha1(f"{repo_id} {branch} {len(commits)}".encode()).hexdigest()
            commits.append((sha, message, files))
            return sha

    def files(self, repo_id, revision="main"):
        return self.repositories[repo_id].at(revision)[1]

    def messages(self, repo_id, branch="main"):
        """Of the commits after the first."""
        return [message for _, message, _ in self.repositories[repo_id].branches[branch][1:]]

    def count(self, pattern):
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStub

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
            for failure in self.hub.failures:
                if re.search(failure.pattern, request):
                    failure.seen += 1
                    if failure.on is None or failure.seen in failure.on:
                        return self.break_off(failure, path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            self.hub.open.wait()
        with self.hub.lock:
            return self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def break_off(self, failure, path):
        length = int(self.headers.get("Content-Length") or 0)
        if failure.done:
            body, self.wfile = self.rfile.read(length), io.BytesIO()
            self.route(path, body)
        elif failure.status is None:
            self.rfile.read(length // 2)
        if failure.status is None:
            self.close_connection = True
            return self.connection.close()
        self.rfile.read(length)
        return self.answer(json.dumps({"error": "as planned"}).encode(), failure.status, **failure.headers)

    def route(self, path, body):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):  # storage of large files: its links need no token
            return self.put_object(path.removeprefix("/lfs/"), body)
        if token and token not in (WRITER, READER):
            return self.answer(b"{}", 401, X_Error_Message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/"), body, token)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(path.removesuffix(".git/info/lfs/objects/batch")[1:], json.loads(body), token)
        parts = path[1:].split("/", 4)
        if len(parts) == 5 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), parts[3], parts[4], token)
        return self.answer(b"{}", 404)

    def readable(self, repo_id, token):
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not token):
            self.answer(b"{}", 404 if token else 401, X_Error_Code="RepoNotFound")
            return None
        return repository

    def writable(self, repo_id, token):
        repository = self.readable(repo_id, token)
        if repository is not None and token != WRITER:
            self.answer(b'{"error": "no right to write"}', 403)
            return None
        return repository

    def create(self, wanted, token):
        if not token:
            return self.answer(b"{}", 401, X_Error_Message="Invalid credentials in Authorization header")
        repo_id = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if token != WRITER or wanted["organization"] == "strangers":
            return self.answer(b'{"error": "no right to create a repository here"}', 403)
        if repo_id in self.hub.repositories:
            return self.answer_json({"url": f"{self.hub.url}/{repo_id}"}, 409)
        self.hub.create(repo_id, private=wanted.get("visibility") == "private")
        return self.answer_json({"url": f"{self.hub.url}/{repo_id}"})

    def api(self, path, body, token):
        parts = [*path.split("/"), "", ""]
        repo_id, action, revision, folder = "/".join(parts[:2]), parts[2], parts[3] or "main", "/".join(parts[4:])
        writes = action in ("preupload", "commit", "branch")
        repository = self.writable(repo_id, token) if writes else self.readable(repo_id, token)
        if repository is None:
            return None
        if action == "branch":
            return self.branch(repo_id, repository, revision)
        found = repository.at(revision)
        if found is None:
            return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        sha, files = found
        if action in ("", "revision"):
            info = {"id": repo_id, "sha": sha, "private": repository.private, "tags": []}
            return self.answer_json(info | {"siblings": [{"rfilename": name} for name in files]})
        if action == "tree":
            return self.tree(files, folder.strip("/"))
        if action == "preupload":
            return self.preupload(json.loads(body)["files"], files)
        if action == "commit":
            return self.commit(repo_id, revision, [json.loads(line) for line in body.splitlines()], files)
        return self.answer(b"{}", 404)

    def branch(self, repo_id, repository, name):
        if name in repository.branches:
            return self.answer(b"{}", 409)
        self.hub.commit(repo_id, name, "branch", dict(repository.at("main")[1]))
        return self.answer_json({})

    def tree(self, files, folder):
        inside = {name: content for name, content in files.items() if not folder or name.startswith(f"{folder}/")}
        if folder and not inside:
            return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
        return self.answer_json(
            [
                {"type": "file", "path": name, "oid": oid(content), "size": len(content)}
                for name, content in inside.items()
            ]
        )

    def preupload(self, wanted, files):
        answers = []
        for file in wanted:
            large = file["path"].endswith(LARGE)
            old = files.get(file["path"])
            known = None if old is None else hashlib.sha256(old).hexdigest() if large else oid(old)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return self.answer_json({"files": answers})

    def batch(self, repo_id, wanted, token):
        if self.writable(repo_id, token) is None:
            return None
        answers = []
        for item in wanted["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            answers.append(item | ({} if item["oid"] in self.hub.objects else upload))
        return self.answer_json({"transfer": "basic", "objects": answers})

    def put_object(self, name, body):
        if hashlib.sha256(body).hexdigest() != name:
            return self.answer(b"{}", 400)
        self.hub.objects[name] = body
        return self.answer()

    def commit(self, repo_id, branch, lines, files):
        files, header = dict(files), lines[0]["value"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(b'{"error": "that file was never uploaded"}', 400)
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif value["path"] not in files:
                return self.answer(b'{"error": "there is nothing to delete"}', 400)
            else:
                del files[value["path"]]
        sha = self.hub.commit(repo_id, branch, header["summary"], files)
        return self.answer_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo_id, revision, name, token):
        repository = self.readable(repo_id, token)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        sha, files = found
        if name not in files:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.answer(files[name], 200, ETag=f'"{oid(files[name])}"', X_Repo_Commit=sha)

    def answer_json(self, content, status=200):
        self.answer(json.dumps(content).encode(), status, Content_Type="application/json")

    def answer(self, content=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def oid(content):
    """git's name of a file with these contents."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
