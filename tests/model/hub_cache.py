"""A cache of the Hugging Face hub, and a server that answers as the hub does, both made of a model folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(folder: Path, cache: Path, name: str, commit: str = COMMIT, reference: str = "main") -> Path:
    """Lay the files of a folder into a cache as huggingface_hub does: blobs, and links to them; the model's root."""
    root = cache / f"models--{name.replace('/', '--')}"
    for part in (root / "blobs", root / "snapshots" / commit, root / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        blob = sha256(file.read_bytes()).hexdigest()
        (root / "blobs" / blob).write_bytes(file.read_bytes())
        (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")
    (root / "refs" / reference).write_text(commit)
    return root


class HubServer:
    """What the server has and was asked for.

    Args:
        folder: of the one model.
        name: of the model.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.fetched: list[str] = []  # files
        self.num_sent = 0  # bytes of files
        self.status = 200  # of answers about the model
        self.error = ""  # X-Error-Code of answers with another status
        self.broken = ""  # a file whose connection breaks half-way

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve; yields the address."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = request.path.partition("?")[0]
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        headers = {"X-Repo-Commit": COMMIT}
        body, status = b"", 200
        if self.name not in path:
            status, headers["X-Error-Code"] = 404, "RepoNotFound"
        elif self.status != 200:
            status, headers["X-Error-Code"] = self.status, self.error
        elif "/tree/" in path:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)[:40]} for f in files]
            body = json.dumps(rows).encode()
        elif path.startswith("/api/models/"):
            if not path.endswith((self.name, "/main", COMMIT)):
                status, headers["X-Error-Code"] = 404, "RevisionNotFound"
            siblings = [{"rfilename": file.name} for file in files]
            body = json.dumps({"id": self.name, "sha": COMMIT, "siblings": siblings}).encode()
        elif not (file := self.folder / path.rpartition("/")[2]).exists():
            status, headers["X-Error-Code"] = 404, "EntryNotFound"
        else:
            body = file.read_bytes()
            headers["ETag"] = f'"{digest(file)}"'
            if with_body:
                self.fetched.append(file.name)
            if wanted := request.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                part = body[int(first) : int(last) + 1 if last else None]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
                body, status = part, 206
            self.num_sent += len(body) * with_body
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if with_body:
            is_broken = self.broken != "" and path.endswith(self.broken)
            request.wfile.write(body[: len(body) // 2] if is_broken else body)
            request.close_connection = is_broken


def digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()
