"""A stand-in of the model hub over HTTP, with answers as bad as a test wants them."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "owner/tiny"
CHUNK = 4096


def commit_of(number: int) -> str:
    """A revision as the hub has them: 40 hexadecimal digits."""
    return hashlib.sha1(str(number).encode()).hexdigest()


@dataclass
class Hub:
    """The files of one repository by revision, and how it answers.

    `truncated` and `corrupt` hold how many more times a file is sent so; `redirected` sends large files from another place;
    `slow` is the pause in seconds between pieces; `failing` is how many more requests are answered with status 500.
    """

    revisions: dict[str, dict[str, bytes]]
    main: str
    truncated: dict[str, int] = field(default_factory=dict)
    corrupt: dict[str, int] = field(default_factory=dict)
    redirected: bool = False
    slow: float = 0.0
    failing: int = 0
    licence: str | None = "openrail++"
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None: ...

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                if hub.failing:
                    hub.failing -= 1
                    return self.send(500, b"trouble")
                path = self.path.partition("?")[0].strip("/")
                if path.startswith("api/models/"):
                    return self.answer_info(path.removeprefix("api/models/"))
                if path.startswith("elsewhere/"):
                    _, revision, name = path.split("/", 2)
                    return self.send_file(revision, name, body=body)
                if path.startswith(f"{REPOSITORY}/resolve/"):
                    revision, name = path.removeprefix(f"{REPOSITORY}/resolve/").split("/", 1)
                    return self.answer_file(revision, name, body=body)
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

            def answer_info(self, path: str) -> None:
                repository, _, revision = path.partition("/revision/")
                if repository != REPOSITORY:
                    return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
                revision = hub.main if revision in ("", "main") else revision
                if revision not in hub.revisions:
                    return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                siblings = []
                for name, content in hub.revisions[revision].items():
                    sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
                    if name.endswith(".safetensors"):
                        sha256 = hashlib.sha256(content).hexdigest()
                        sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
                    siblings.append(sibling)
                card = {} if hub.licence is None else {"cardData": {"license": hub.licence}}
                document = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": revision, "siblings": siblings, "tags": []} | card
                self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

            def answer_file(self, revision: str, name: str, *, body: bool) -> None:
                content = hub.revisions.get(revision, {}).get(name)
                if content is None:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                if hub.redirected and name.endswith(".safetensors"):
                    headers = {"Location": f"{hub.url}/elsewhere/{revision}/{name}", "X-Repo-Commit": revision}
                    headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": etag(name, content)}
                    return self.send(302, b"", headers)
                self.send_file(revision, name, body=body)

            def send_file(self, revision: str, name: str, *, body: bool) -> None:
                content = hub.revisions[revision][name]
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                headers = {"ETag": etag(name, content), "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_response(206 if start else 200)
                for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.send_body(name, content, start=start)

            def send_body(self, name: str, content: bytes, *, start: int) -> None:
                if hub.corrupt.get(name, 0):
                    hub.corrupt[name] -= 1
                    content = content[:-1] + bytes([content[-1] ^ 1])
                end = len(content)
                if hub.truncated.get(name, 0):
                    hub.truncated[name] -= 1
                    end = start + (end - start) // 2
                for position in range(start, end, CHUNK):
                    self.wfile.write(content[position : min(position + CHUNK, end)])
                    time.sleep(hub.slow)
                if end < len(content):
                    self.close_connection = True

            def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler


def git_sha1(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    """As the hub has it: SHA-256 of large files, git's name of others."""
    return f'"{hashlib.sha256(content).hexdigest() if name.endswith(".safetensors") else git_sha1(content)}"'


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub.handler())
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
