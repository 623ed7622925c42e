"""A fake wandb server that stores what it is sent: the part of the protocol that the client requires."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "0123456789abcdef0123456789abcdef01234567"


class WandbServer:
    """Listens on a free port; `runs` has the history of each run by id."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        """Variables of all alerts, in order."""
        self.paths: list[str] = []
        """Paths of all requests, in order."""
        self.answers = threading.Event()
        """While cleared, requests are received but not answered."""
        self.answers.set()
        self._http = _Http(("127.0.0.1", 0), _Requests)
        self._http.daemon_threads = True
        setattr(self._http, "kept", self)  # noqa: B010 - how http.server hands things to its handlers
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with its address and an API key."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """Return the rows of a run without wandb's own keys."""
        rows = [json.loads(line) for line in self.runs.get(run_id, {"history": []})["history"]]
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]

    def summary(self, run_id: str) -> dict[str, Any]:
        """Return the summary of a run."""
        return json.loads(self.runs[run_id]["summary"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.answers.set()
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a killed client leaves its connection open


class _Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def kept(self) -> WandbServer:
        return self.server.kept  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        self.kept.paths.append(self.path)
        if self.path == "/graphql":
            self._answer({"data": self._query(json.loads(body))})
            return
        if self.path.endswith("/file_stream"):
            self._stream(self.kept.runs[self.path.split("/")[-2]], json.loads(body))
        self._answer({})

    def _stream(self, run: dict[str, Any], sent: dict[str, Any]) -> None:
        run |= {key: sent[key] for key in ("preempting", "exitcode") if key in sent}
        files = sent.get("files", {})
        if (chunk := files.get("wandb-history.jsonl")) is not None:
            run["history"][chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
        if (chunk := files.get("wandb-summary.json")) is not None:
            run["summary"] = chunk["content"][0]

    def _query(self, query: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
        name, given = found[1] if found else "", query.get("variables") or {}
        project = {"id": "UA==", "name": given.get("project"), "entity": {"id": "RQ==", "name": "team"}}
        if name == "RunResumeStatus":
            run = self.kept.runs.get(given["name"])
            return {"model": {**project, "bucket": None if run is None else self._resumed(given["name"], run)}}
        if name == "UpsertBucket":
            is_new = given["name"] not in self.kept.runs
            run = self.kept.runs.setdefault(given["name"], {"history": [], "summary": "{}"})
            run |= {k: v for k, v in given.items() if v is not None}
            bucket = {"id": "Ug==", "name": given["name"], "displayName": run.get("displayName"), "project": project}
            return {"upsertBucket": {"inserted": is_new, "bucket": {**bucket, "historyLineCount": len(run["history"])}}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.kept.url}/upload"} for file in given["files"]]
            return {"createRunFiles": {"runID": "Ug==", "uploadHeaders": [], "files": files}}
        if name == "NotifyScriptableRunAlert":
            self.kept.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "Viewer":
            return {"viewer": {"id": "Vg==", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"features": []}}

    def _resumed(self, run_id: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "Ug==",
            "name": run_id,
            "displayName": run.get("displayName"),
            "summaryMetrics": run["summary"],
            "config": run.get("config", "{}"),
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": len(run["history"]),
            "historyTail": json.dumps(run["history"][-1:]),
        }

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: object) -> None:
        self.kept.answers.wait()
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
