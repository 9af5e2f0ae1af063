"""A small server on loopback that speaks as much of the Hub's HTTP protocol as huggingface_hub asks for.

Repository information and file trees under /api, files under /{repository}/resolve/{revision}/{file} with commit,
ETag, size and a redirect to another address for large files, as the Hub does; Range requests; 401 and 403 for
repositories that are hidden or gated, and for a token that has expired.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes; larger files are redirected, as those in Git LFS are


class Hub:
    """Serves repositories = {"owner/name": folder}; `gated` ones only to `token`, and none to `expired`.

    requests: (method, path, Range header or None) of every request; cut: files whose next download breaks off
    in the middle
    """

    def __init__(
        self, repositories: dict[str, Path], gated: tuple[str, ...] = (), token: str = "", expired: str = "hf_expired"
    ):
        self.repositories, self.gated, self.token, self.expired = repositories, gated, token, expired
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}"  # to the client, another host

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path, request.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*|/tree/.*)?", path):
            repository, rest = match.groups()
            if self.refused(request, repository, files=False):
                return
            files = self.files(repository)
            if rest and rest.startswith("/tree"):
                entries = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in files.items()]
                return self.json(request, entries)
            info = {"id": repository, "sha": COMMIT, "private": False, "gated": repository in self.gated}
            return self.json(request, {**info, "siblings": [{"rfilename": name} for name in files]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repository, name = match.groups()
            if self.refused(request, repository, files=True):
                return
            file = self.repositories[repository] / name
            if not file.is_file():
                return self.error(request, 404, "EntryNotFound")
            etag = hashlib.sha256(file.read_bytes()).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
            headers["X-Linked-Size"] = str(file.stat().st_size)
            if file.stat().st_size > LARGE:
                return self.send(request, 302, b"", {**headers, "Location": f"{self.cdn}/cdn/{repository}/{name}"})
            return self.file(request, file, headers, body)
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self.file(request, self.repositories[match[1]] / match[2], {}, body)
        return self.error(request, 404, "RepoNotFound")

    def files(self, repository: str) -> dict[str, int]:
        folder = self.repositories[repository]
        return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}

    def refused(self, request: BaseHTTPRequestHandler, repository: str, files: bool) -> bool:
        """Answer for an expired token, a repository that is not there (401) or, for its files, gated (401 or 403)."""
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == self.expired:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}  # and no code, as the Hub
            self.send(request, 401, b"", headers)
        elif repository not in self.repositories:
            self.error(request, 401, "RepoNotFound")
        elif files and repository in self.gated and token != self.token:
            self.error(request, 403 if token else 401, "GatedRepo")
        else:
            return False
        return True

    def file(self, request: BaseHTTPRequestHandler, file: Path, headers: dict, body: bool):
        content, status = file.read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        headers = {**headers, "Accept-Ranges": "bytes"}
        if body and file.name in self.cut:
            self.cut.remove(file.name)
            self.send(request, status, content, headers, sent=len(content) // 2)
            request.close_connection = True
        else:
            self.send(request, status, content if body else b"", headers, length=len(content))

    def json(self, request: BaseHTTPRequestHandler, value):
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, request: BaseHTTPRequestHandler, status: int, code: str):
        self.send(request, status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(
        self, request, status: int, content: bytes, headers: dict, length: int | None = None, sent: int | None = None
    ):
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content) if length is None else length))
        request.end_headers()
        request.wfile.write(content[:sent])
