"""A stand-in for the hub's endpoint on loopback: what huggingface_hub needs of its protocol to draw and to push."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub:
    """Repositories, {"owner/name": {path: bytes}}, at `endpoint`; `requests` lists what was asked, "GET /path".

    `tokens` are those it was asked with. With a `refusal`, 401 or 403, it answers with nothing else.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, set[str]] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.refusal = 0
        self.endpoint = ""

    def add(self, repo: str, folder: Path, branches: tuple[str, ...] = ("main",)) -> None:
        """Publish a folder's files on some branches."""
        files = (path for path in folder.rglob("*") if path.is_file())
        self.repositories[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.branches[repo] = set(branches)

    def commit(self, repo: str) -> str:
        """A hash of the repository's content, as long as git's."""
        digest = hashlib.sha1(repo.encode())
        for path, data in sorted(self.repositories[repo].items()):
            digest.update(path.encode() + data)
        return digest.hexdigest()

    @property
    def downloads(self) -> set[str]:
        """The files that were drawn so far."""
        found = (re.match(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.*)", request) for request in self.requests)
        return {match[1] for match in found if match}

    # ---- the protocol: each method answers with an object to be sent as JSON, or with a file's bytes

    def info(self, repo: str, revision: str, body: bytes) -> dict:
        siblings = [{"rfilename": path} for path in self.repositories[repo]]
        return {"id": repo, "sha": self.commit(repo), "private": False, "tags": [], "siblings": siblings}

    def tree(self, repo: str, revision: str, body: bytes) -> list:
        files = self.repositories[repo].items()
        return [{"type": "file", "path": path, "size": len(data), "oid": etag(data)} for path, data in files]

    def resolve(self, repo: str, revision: str, body: bytes, path: str) -> bytes:
        return self.repositories[repo][path]

    def create(self, body: bytes) -> dict:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        self.repositories.setdefault(repo, {})
        self.branches.setdefault(repo, {"main"})
        return {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}

    def whoami(self, body: bytes) -> dict:
        return {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}}

    def validate(self, body: bytes) -> dict:
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str, body: bytes) -> dict:
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}

    def push(self, repo: str, revision: str, body: bytes) -> dict:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                self.repositories[repo].pop(line["value"]["path"], None)
        sha = self.commit(repo)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo}/commit/{sha}"}


ROUTES = {
    rf"GET /api/models/{NAME}(/revision/(?P<revision>.+))?": Hub.info,
    rf"GET /api/models/{NAME}/tree/(?P<revision>[^/]+)": Hub.tree,
    rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Hub.resolve,
    r"GET /api/whoami-v2": Hub.whoami,
    r"POST /api/repos/create": Hub.create,
    r"POST /api/validate-yaml": Hub.validate,
    rf"POST /api/models/{NAME}/preupload/(?P<revision>.+)": Hub.preupload,
    rf"POST /api/models/{NAME}/commit/(?P<revision>.+)": Hub.push,
}


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.hub.requests.append(request)
        self.hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.refusal:
            return self.reply(self.hub.refusal, {"X-Error-Message": "You may not do that."}, b"{}")
        for pattern, answer in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                return self.answer(answer, body, match.groupdict())
        return self.reply(404, {"X-Error-Message": f"no such route: {request}"}, b"{}")

    do_HEAD = do_POST = do_GET

    def answer(self, answer, body: bytes, named: dict) -> None:
        hub, repo = self.hub, named.get("repo")
        if "repo" in named and repo not in hub.repositories:
            return self.reply(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}")
        if "revision" in named:
            named["revision"] = named["revision"] or "main"
            if named["revision"] not in {*hub.branches[repo], hub.commit(repo)}:
                return self.reply(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "No revision"}, b"{}")
        if "path" in named and named["path"] not in hub.repositories[repo]:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "No such file"}, b"{}")
        content = answer(hub, body=body, **named)
        if isinstance(content, bytes):
            return self.reply(200, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": hub.commit(repo)}, content)
        return self.reply(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Keep the tests' output free of it."""


def point_at(endpoint: str, monkeypatch) -> None:
    """What HF_ENDPOINT sets at the start of a process."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}")


def dead_end(monkeypatch) -> None:
    """An endpoint where nobody listens."""
    point_at("http://127.0.0.1:9", monkeypatch)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, for as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
