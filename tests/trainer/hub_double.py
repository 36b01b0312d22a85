# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
The part of the Hub that `huggingface_hub` talks to when it pushes and loads models, on a port of this machine: repositories
with commits, regular and LFS files, the check of a card's metadata, access tokens; and faults on demand.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_tokenOfTheDouble0123456789"
USER = "someone"

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "openrail", "other"}
PIPELINE_TAGS = {"text-to-image", "text-to-video"}


@dataclass
class Fault:
    """What happens to requests whose method and path match, the first `times` of them, or all."""

    pattern: str
    status: int | None = None  # else see `kind`
    kind: str = "answer"  # or "reset" or "hang"
    times: float = float("inf")
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Commit:
    """A state of a repository."""

    message: str
    files: dict[str, bytes]
    changed: list[str]

    @property
    def sha(self) -> str:
        listing = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in self.files.items())
        return hashlib.sha1(json.dumps([self.message, listing]).encode()).hexdigest()


class HubDouble:
    """
    Use as a context manager; `url` is the endpoint.

    Args:
        lfs (`bool`, *optional*, defaults to `True`): whether safetensors and images are LFS files, else all are regular.
    """

    def __init__(self, lfs: bool = True):
        self.lfs = lfs
        self.repos: dict[str, list[Commit]] = {}
        self.objects: dict[str, bytes] = {}  # LFS
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> "HubDouble":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, status: int | None = None, **kwargs) -> None:
        """Add a [`Fault`]."""
        self.faults.append(Fault(pattern, status, **kwargs))

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The newest state of a repository."""
        return self.repos[repo_id][-1].files

    def everything(self) -> dict[str, bytes]:
        """All that was ever received: every file of every commit, its name, and LFS files."""
        received = {f"lfs/{oid}": content for oid, content in self.objects.items()}
        for repo_id, commits in self.repos.items():
            for number, commit in enumerate(commits):
                received[f"{repo_id}@{number}/message"] = commit.message.encode()
                received |= {f"{repo_id}@{number}/{path}": content for path, content in commit.files.items()}
        return received

    def pick_fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    # Answers

    def answer(self, content: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        url = urlsplit(self.path)
        self.path, self.query = unquote(url.path), parse_qs(url.query)
        fault = self.hub.pick_fault(f"{self.command} {self.path}")
        if fault is None:
            self.route()
        elif fault.kind == "hang":
            self.hub.closing.wait()
            self.close_connection = True
        elif fault.kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self.answer({"error": "as ordered"}, fault.status, fault.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self) -> None:
        routes = {
            r"POST /api/repos/create": self.create,
            r"GET /api/whoami-v2": self.whoami,
            r"POST /api/validate-yaml": self.validate,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)": self.preupload,
            r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)": self.commit,
            r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"PUT /lfs/(?P<oid>\w+)": self.lfs_upload,
            r"POST /lfs/verify": self.lfs_verify,
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)/?(?P<folder>.*)": self.tree,
            r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?": self.info,
            r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)": self.resolve,
        }
        for pattern, method in routes.items():
            match = re.fullmatch(pattern, f"{self.command} {self.path}")
            if match:
                return method(**match.groupdict())
        self.refuse(404, f"no such page: {self.command} {self.path}")

    def may_write(self) -> bool:
        given = self.headers.get("Authorization")
        if given != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid username or password." if given is None else "Invalid user token.")
            return False
        return True

    def find(self, repo: str) -> list[Commit] | None:
        if repo not in self.hub.repos:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        return self.hub.repos[repo]

    # Pages

    def whoami(self) -> None:
        if self.may_write():
            self.answer({"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self.may_write():
            return
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or USER}/{wanted['name']}"
        if repo in self.hub.repos:
            return self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409)
        self.hub.repos[repo] = [Commit("initial commit", {".gitattributes": b""}, [])]
        self.answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = card_errors(content)
        self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        commits = self.may_write() and self.find(repo)
        if not commits:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if self.hub.lfs and file["path"].endswith((".safetensors", ".png", ".mp4")) else "regular"
            old = commits[-1].files.get(file["path"])
            oid = None
            if old is not None:
                regular = hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
                oid = hashlib.sha256(old).hexdigest() if mode == "lfs" else regular
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        if not self.may_write():
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            known = wanted["oid"] in self.hub.objects
            objects.append({**wanted, "authenticated": True, **({} if known else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "the file is not the one that was announced")
        self.hub.objects[oid] = self.body
        self.answer(b"")

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        known = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
        self.answer({}) if known else self.refuse(404, "no such object")

    def commit(self, repo: str, revision: str) -> None:
        commits = self.may_write() and self.find(repo)
        if not commits:
            return
        files, changed, message = dict(commits[-1].files), [], ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                continue
            changed.append(value["path"])
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                return self.refuse(400, f"{entry['key']} {value['path']} is not possible")
        commits.append(Commit(message, files, changed))
        sha = commits[-1].sha
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, revision: str | None) -> None:
        commits = self.find(repo)
        if commits:
            siblings = [{"rfilename": path} for path in commits[-1].files]
            self.answer({"id": repo, "modelId": repo, "sha": commits[-1].sha, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        commits = self.find(repo)
        if commits:
            self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in commits[-1].files.items()
                    if path.startswith(f"{folder}/" if folder else "")
                ]
            )

    def resolve(self, repo: str, revision: str, file: str) -> None:
        commits = self.find(repo)
        if not commits:
            return
        sha = {"X-Repo-Commit": commits[-1].sha}
        content = commits[-1].files.get(file)
        if content is None:
            return self.answer({}, 404, sha | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        headers = sha | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start and int(start[1]) > 0:
            part = content[int(start[1]) :]
            range_ = {"Content-Range": f"bytes {start[1]}-{len(content) - 1}/{len(content)}"}
            return self.answer(part, 206, headers | range_)
        self.answer(content, 200, headers)


def card_errors(content: str) -> list[str]:
    """What the Hub objects to in the metadata of a model card: a part of its rules, strictly."""
    match = re.match(r"\A---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", content, re.DOTALL)
    if match is None:
        return ["the card has no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = []
    repo = re.compile(r"[\w-]+/[\w.-]+")
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not repo.fullmatch(value):
                errors.append(f'"{name}" with value "{value}" is not valid. Use a model id from the Hub.')
    if data.get("license") is not None and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required if "license" is "other"')
    if data.get("pipeline_tag") is not None and data["pipeline_tag"] not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" must be one of {sorted(PIPELINE_TAGS)}')
    for name in ("tags", "metrics", "datasets"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a list of strings')
    for entry in data.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {}).get("url"), str):
            errors.append('"widget" entries need a "text" and an "output" with a "url"')
    return errors
