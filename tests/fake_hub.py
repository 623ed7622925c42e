"""A hub of data sets in this process, with as much of the protocol as the real code of `datasets` uses."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote


class Hub:
    """A data set with one commit."""

    def __init__(self, name: str, files: Mapping[str, bytes], *, commit: str) -> None:
        self.name, self.files, self.commit = name, dict(files), commit
        self.address = ""

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers."""
        path = unquote(path.partition("?")[0])
        if path.startswith(f"/api/datasets/{self.name}/tree/"):
            _, _, folder = path.removeprefix(f"/api/datasets/{self.name}/tree/").partition("/")
            return 200, json.dumps(self._list(folder)).encode(), {}
        if path.startswith(f"/api/datasets/{self.name}"):
            described = {"id": self.name, "sha": self.commit, "siblings": [{"rfilename": name} for name in self.files]}
            return 200, json.dumps(described | {"private": False, "tags": []}).encode(), {}
        if path.startswith(f"/datasets/{self.name}/resolve/"):
            _, _, name = path.removeprefix(f"/datasets/{self.name}/resolve/").partition("/")
            headers = {"X-Repo-Commit": self.commit}
            if name not in self.files:
                return 404, b"", headers | {"X-Error-Code": "EntryNotFound"}
            return 200, self.files[name], headers | {"ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"'}
        return 404, b"", {"X-Error-Code": "RepoNotFound"}

    def _list(self, folder: str) -> list[dict[str, object]]:
        inside = f"{folder}/" if folder else ""
        names = {name.removeprefix(inside) for name in self.files if name.startswith(inside)}
        folders = {name.partition("/")[0] for name in names if "/" in name}
        found: list[dict[str, object]] = [
            {"type": "file", "oid": "0" * 40, "path": inside + name, "size": len(self.files[inside + name])}
            for name in sorted(names)
            if "/" not in name
        ]
        return [*found, *({"type": "directory", "oid": "0" * 40, "path": inside + name} for name in sorted(folders))]


@contextmanager
def serving(hub: Hub, *others: Hub) -> Iterator[Hub]:
    """Serve data sets at `hub.address`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            meant = next((one for one in others if one.name in unquote(self.path)), hub)
            code, body, headers = meant.answer(self.path)
            start, end = 0, len(body)
            if code == 200 and (asked := self.headers.get("Range")):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), int(last) + 1 if last else end
                code, headers = 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(end - start)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[start:end])

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
