"""A Hub on loopback: the few routes of huggingface.co that the official client uses to create, fill, list and read
repositories, with what the real one answers. Repositories live in memory; every commit is kept. The name of a data set's
begins with `datasets/`, as its address does.

Public repositories are read by all; writing, and reading private ones, takes the token `WRITE_TOKEN`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


WRITE_TOKEN = "hf_SecretOfTheTests"
REPO = r"(?P<repo>(datasets/)?[\w.-]+/[\w.-]+)"
API = rf"/api/(models/)?{REPO}"


@dataclass
class Discussion:
    """A pull request; its commits are on the branch `refs/pr/<num>`."""

    num: int
    author: str


class Repository:
    def __init__(self, private: bool = False):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}  # commit -> path -> content
        self.messages: list[str] = []
        self.branches: dict[str, str] = {}
        self.discussions: list[Discussion] = []
        self.commit({}, "initial commit", "main")

    def commit(self, files: dict[str, bytes], message: str, branch: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub(ThreadingHTTPServer):
    """`repositories`: name -> `Repository`; `requests`: (method, path) of all that were answered; `failing`: a pattern of
    the paths that are answered by status 500."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.failing: str | None = None
        self.lock = threading.Lock()

    def add(self, name: str, folder: Path, message: str = "add") -> str:
        """A commit with the files of a folder, as if someone had uploaded it; returns its SHA."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, message, "main")


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", commit: str = ""):
        self.status, self.headers, self.message = status, {"X-Error-Code": code} if code else {}, message or code
        if commit:  # of a repository that has no such file, which the client then remembers
            self.headers["X-Repo-Commit"] = commit


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    # ---- one method per route --------------------------------------------------------------------------------------

    def create(self, body):
        name = f"{body['organization'] or 'me'}/{body['name']}"
        self.authorise()
        found = name in self.server.repositories
        if not found:
            self.server.repositories[name] = Repository(body.get("visibility") == "private")
        self.answer({"url": f"{self.server.address}/{name}", "name": name}, 409 if found else 200)

    def validate_yaml(self, body):
        block = re.match(r"---\n(.*?)\n---", body["content"], re.DOTALL)
        data = yaml.safe_load(block.group(1)) if block else {}
        wrong = [entry for entry in data.get("model-index", []) if not (entry.get("name") and entry.get("results"))]
        messages = [{"message": '"model-index[0].results" is required'}] if wrong else []
        self.answer({"errors": messages, "warnings": []}, 400 if messages else 200)

    def branch(self, body, repo, name):
        self.authorise()
        repository = self.repository(repo)
        if name in repository.branches:
            raise Refusal(409)
        repository.branches[name] = repository.branches["main"]
        self.answer({})

    def preupload(self, body, repo, revision):
        self.authorise()
        _, files = self.files(repo, revision)
        listed = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".wav")) else "regular",
                "shouldIgnore": False,
                "oid": git_blob(files[file["path"]]) if file["path"] in files else None,
            }
            for file in body["files"]
        ]
        self.answer({"files": listed})

    def large_file_batch(self, body, repo):
        self.authorise()
        objects = [{"oid": item["oid"], "size": item["size"]} for item in body["objects"]]
        for item in objects:
            if item["oid"] not in self.server.large_files:
                item["actions"] = {"upload": {"href": f"{self.server.address}/large-files/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def large_file(self, body, oid):  # no token: like a signed address of the storage
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message="this is not what was announced")
        self.server.large_files[oid] = body
        self.answer({})

    def commit(self, body, repo, revision):
        self.authorise()
        repository = self.repository(repo)
        if revision not in repository.branches:
            raise Refusal(404, "RevisionNotFound")
        operations = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.files(revision))
        for operation in operations:
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repository.commit(files, operations[0]["value"]["summary"], revision)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.server.address}/{repo}/commit/{sha}"})

    def info(self, body, repo, revision="main"):
        sha, files = self.files(repo, revision)
        card = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        self.answer({
            "_id": repo, "id": repo.removeprefix("datasets/"), "sha": sha, "private": self.repository(repo).private, "tags": [],
            "siblings": [{"rfilename": path} for path in files],
            "cardData": yaml.safe_load(card.group(1)) if card else None,
        })  # fmt: skip

    def discussions(self, body, repo):
        wanted = parse_qs(urlsplit(self.path).query).get("author", [None])[0]
        found = [one for one in self.repository(repo).discussions if wanted in (None, one.author)]
        listed = [
            {
                "num": one.num,
                "title": "Adding `safetensors` variant of this model",
                "author": {"name": one.author},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
            }
            for one in found
        ]
        self.answer({"discussions": listed, "count": len(listed), "start": 0})

    def tree(self, body, repo, revision, folder=""):
        _, files = self.files(repo, revision)
        found = [
            {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
            for path, content in files.items()
            if path.startswith(folder)
        ]
        if folder and not found:
            raise Refusal(404, "EntryNotFound")
        self.answer(found)

    def resolve(self, body, repo, revision, path):
        sha, files = self.files(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", commit=sha)
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.answer(content, headers=headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if first > last:
            raise Refusal(416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(content[first : last + 1], 206, headers)

    ROUTES = (  # method, pattern of the path, handler
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", rf"{API}/branch/(?P<name>.+)", branch),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", preupload),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", commit),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", large_file_batch),
        ("PUT", r"/large-files/(?P<oid>\w+)", large_file),
        ("GET", rf"{API}(/revision/(?P<revision>refs/pr/\d+|[^/]+))?", info),
        ("GET", rf"{API}/discussions", discussions),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", tree),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    )

    # ---- who may do what -------------------------------------------------------------------------------------------

    def authorise(self):
        match self.headers.get("Authorization"):
            case None:
                raise Refusal(401, message="Invalid username or password.")
            case other if other != f"Bearer {WRITE_TOKEN}":
                raise Refusal(403, message="You don't have the rights to write there.")

    def repository(self, name) -> Repository:
        repository = self.server.repositories.get(name)
        hidden = repository and repository.private and self.headers.get("Authorization") != f"Bearer {WRITE_TOKEN}"
        if repository is None or hidden:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repository

    def files(self, name, revision) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "json" in self.headers.get("Content-Type", "") and "ndjson" not in self.headers["Content-Type"]:
            body = json.loads(body)
        method = "GET" if self.command == "HEAD" else self.command
        with self.server.lock:
            self.server.requests.append((self.command, path))
            try:
                if self.server.failing and re.search(self.server.failing, path):
                    raise Refusal(500, message="try again later")
                for verb, pattern, route in self.ROUTES:
                    if verb == method and (found := re.fullmatch(pattern, path)):
                        parts = {name: value for name, value in found.groupdict().items() if value is not None}
                        return route(self, body, **parts)
                raise Refusal(404, message=f"no such route: {self.command} {path}")
            except Refusal as refusal:
                self.answer({"error": refusal.message}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, content, status=200, headers=()):
        is_json = not isinstance(content, bytes)
        content = json.dumps(content).encode() if is_json else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass
