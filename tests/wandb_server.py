"""A W&B server on the loopback that knows as much of W&B's protocol as a run needs, and keeps what it is sent."""

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """What was sent, by the id of its run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.operations: list[tuple[str, dict[str, Any]]] = []
        """Names and variables of the GraphQL operations."""
        self.lines: dict[str, dict[int, str]] = {}
        """The history of each run, by line."""
        self.exit_codes: dict[str, list[int]] = {}
        self.headers: list[dict[str, str]] = []
        """Of every request, without the one that carries the key."""
        self.keys: set[str] = set()
        """What that one said."""
        self.sent = b""
        """Addresses and bodies of all requests."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionResetError):  # W&B's process ends without a word
            super().handle_error(request, client_address)

    def history(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run, in order."""
        lines = self.lines.get(run_id, {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def upserts(self) -> list[dict[str, Any]]:
        """The variables of each request for a run."""
        return [variables for name, variables in self.operations if name == "UpsertBucket"]


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that runs within the block."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: WandbServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._read()
        self._answer({})

    def do_PUT(self) -> None:
        self._read()
        self._answer({})

    def do_POST(self) -> None:
        body = self._read()
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            found = re.search(r"(query|mutation)\s+(\w+)", request["query"])
            name, variables = found[2] if found else "", request.get("variables") or {}
            self.server.operations.append((name, variables))
            self._answer({"data": self._data(name, variables)})
        elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._keep(match[1], json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    def _keep(self, run_id: str, sent: dict[str, Any]) -> None:
        history = (sent.get("files") or {}).get("wandb-history.jsonl") or {}
        lines = self.server.lines.setdefault(run_id, {})
        for number, line in enumerate(history.get("content", []), start=history.get("offset", 0)):
            lines[number] = line
        if sent.get("complete"):
            self.server.exit_codes.setdefault(run_id, []).append(sent["exitcode"])

    def _data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._run(variables), "inserted": True}}
        if name == "RunResumeStatus":
            return self._resume_status(variables)
        if name == "ArtifactType":  # asked before a table is logged
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":  # as if the table's content were there already: nothing is uploaded
            sequence = {"latestArtifact": {"id": "A"}}
            return {"createArtifact": {"artifact": {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}}}
        if name == "Viewer":
            viewer = {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"latestLocalVersionInfo": None}}
        if name == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.server.url}/put/{n}"} for n in variables.get("files", [])]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        return {"serverInfo": {"features": [], "latestLocalVersionInfo": None}}

    def _run(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": variables.get("project"), "entity": {"id": "E", "name": "me"}}
        return {
            "id": "Ug==",
            "name": variables.get("name"),
            "displayName": variables.get("displayName") or "run",
            "description": "",
            "config": "{}",
            "sweepName": None,
            "project": project,
            "historyLineCount": len(self.server.lines.get(str(variables.get("name")), {})),
        }

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        lines = self.server.lines.get(str(variables.get("name")))
        if not lines:
            return {"model": {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}, "bucket": None}}
        bucket = {
            **self._run({"name": variables["name"]}),
            "summaryMetrics": "{}",
            "historyLineCount": len(lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([lines[max(lines)]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),  # without it, W&B takes the run for one that never began
        }
        return {"model": {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}, "bucket": bucket}}

    def _read(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.keys.add(headers.pop("authorization", ""))
        self.server.headers.append(headers)
        self.server.sent += self.path.encode() + b"\n" + body + b"\n"
        return body

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
