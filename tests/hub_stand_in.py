"""A Hub on this machine, as far as pushing and loading models goes: it keeps what arrives, and fails when told to."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".png", ".bin", ".onnx", ".npz")


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]
    large: set[str]  # names that came by LFS


@dataclass
class Repository:
    private: bool = False
    gated: str | None = None
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "init", {}, set())]})

    def commit(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


class HubStandIn:
    """
    Attributes:
        repositories: by id.
        requests: "METHOD /path" of all that arrived.
        failures: {regular expression over "METHOD /path": status to answer with, or None to hang up}.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: dict[str, int | None] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def add_file(self, repo_id: str, name: str, content: bytes):
        """Puts a file there without a push."""
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.branches["main"][-1].files[name] = content


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        for pattern, status in self.hub.failures.items():
            if re.search(pattern, request):
                if status is None:
                    self.close_connection = True
                    return
                return self._answer(status, {"error": "told to fail"})
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                return getattr(self, method)(*match.groups(), body=body)
        self._answer(404, {"error": f"no route {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *_):
        pass

    def _answer(self, status: int, content=None, headers: dict | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _find(self, repo_id: str, revision: str = "main") -> Commit | None:
        """The commit asked for; answers if there is none, or if it is not for this reader."""
        repository = self.hub.repositories.get(repo_id)
        reader = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not reader):
            self._answer(401 if repository else 404, {}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.commit(revision)
        if commit is None:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def create(self, body):
        fields = json.loads(body)
        repo_id = f"{fields['organization']}/{fields['name']}"
        if not self._may_write():
            return
        if repo_id in self.hub.repositories:
            return self._answer(409, {"url": f"{self.hub.endpoint}/{repo_id}", "error": "exists"})
        self.hub.repositories[repo_id] = Repository(private=fields.get("visibility") == "private")
        self._answer(200, {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def settings(self, repo_id, body):
        self.hub.repositories[repo_id].gated = json.loads(body).get("gated")
        self._answer(200, {})

    def branch(self, repo_id, name, body):
        branches = self.hub.repositories[repo_id].branches
        status = 409 if name in branches else 200
        branches.setdefault(name, list(branches["main"]))
        self._answer(status, {})

    def validate(self, body):
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, repo_id, revision="main", body=b""):
        commit = self._find(repo_id, revision)
        if commit:
            private = self.hub.repositories[repo_id].private
            siblings = [{"rfilename": name} for name in commit.files]
            self._answer(200, {"id": repo_id, "sha": commit.sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo_id, revision, body):
        commit = self._find(repo_id, revision)
        if commit:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in commit.files.items()
            ]
            self._answer(200, entries)

    def preupload(self, repo_id, revision, body):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
        answer = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
        self._answer(200, {"files": answer})

    def batch(self, repo_id, body):
        answer = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            answer.append(entry)
        self._answer(200, {"transfer": "basic", "objects": answer})

    def upload(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "content and name differ"})
        self.hub.objects[oid] = body
        self._answer(200, {})

    def commit(self, repo_id, revision, body):
        if not self._may_write():
            return
        entries = [json.loads(line) for line in body.splitlines()]
        commits = self.hub.repositories[repo_id].branches[revision]
        files, large, message = dict(commits[-1].files), set(commits[-1].large), ""
        for kind, value in ((entry["key"], entry["value"]) for entry in entries):
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                large.add(value["path"])
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(body).hexdigest()
        commits.append(Commit(sha, message, files, large))
        self._answer(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def resolve(self, repo_id, revision, name, body):
        commit = self._find(repo_id, revision)
        if commit is None:
            return
        if name not in commit.files:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha})
        content = commit.files[name]
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha})


_ID = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    (f"PUT /api/models/{_ID}/settings", "settings"),
    (f"POST /api/models/{_ID}/branch/(.+)", "branch"),
    (f"POST /api/models/{_ID}/preupload/(.+)", "preupload"),
    (f"POST /api/models/{_ID}/commit/(.+)", "commit"),
    (f"GET /api/models/{_ID}", "info"),
    (f"GET /api/models/{_ID}/revision/(.+)", "info"),
    (f"GET /api/models/{_ID}/tree/([^/]+)", "tree"),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "upload"),
    (f"(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)", "resolve"),
)
