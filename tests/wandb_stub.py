"""A stand-in for the Weights & Biases backend on loopback: GraphQL, file_stream, uploads.

It shows what the client sends, not that the real service accepts it. `WANDB_BASE_URL` (or `Settings(base_url=...)`)
points a client at it; the key must have 40 characters or more (`KEY` will do). A test that ends with a name in
`unknown` has met a call that the stand-in does not answer.
"""

# ruff: noqa: N802  # the methods are named after GraphQL operations

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast
from urllib.parse import quote

KEY = "0" * 40
THEN = "2026-01-01T00:00:00"
PROJECT_ID = "UHJvamVjdEludGVybmFsSWQ6MQ=="
LAST_PAGE = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
RUN_ATTRIBUTES = ("groupName", "jobType", "displayName", "tags", "notes", "commit", "repo", "state", "sweep")

Variables = dict[str, Any]


def encoded(name: str) -> str:
    """Return an opaque id, as the service makes them."""
    return base64.b64encode(name.encode()).decode()


class WandbStub(ThreadingHTTPServer):
    """`with WandbStub() as stub:` answers at `stub.url` and keeps what it was sent.

    runs, by id: config, history, summary, logs, events, exit_code, complete, upserts, and what W&B calls
        groupName, jobType, displayName, tags, notes, commit, state.
    reports, by id: displayName, description, spec (JSON), project.
    artifacts, by id: what CreateArtifact was given, and a state. uploads, by path: bytes.
    ops: how often each operation was called. unknown: the calls that had no answer here.
    fail: called with ("gql", operation) or ("file_stream", path); an HTTP status that it returns is injected.
    """

    daemon_threads = True

    def __init__(self, port: int = 0, entity: str = "ent", projects: Collection[str] = ()) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.entity, self.projects = entity, set(projects)
        self.lock, self.counter = threading.Lock(), itertools.count(1)
        self.runs: dict[str, dict[str, Any]] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.ops: Counter[str] = Counter()
        self.unknown: list[tuple[str, str, Variables]] = []
        self.fail: Callable[[str, str], int | None] = lambda kind, operation: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Say nothing: clients drop the sockets they kept alive."""

    def run(self, name: str) -> dict[str, Any]:
        """Return what is known of a run, making it where it is new."""
        empty: dict[str, Any] = {key: [] for key in ("history", "logs", "events", "upserts")}
        return self.runs.setdefault(name, empty | {"config": {}, "summary": {}, "exit_code": None, "complete": False})

    def answer(self, operation: str, variables: Variables, query: str) -> dict[str, Any]:
        """Answer a GraphQL operation by the method op_<its name>."""
        method = getattr(self, f"op_{operation}", None)
        if method is None:
            self.unknown.append((operation, query[:4000], variables))
            return {"errors": [{"message": f"stub: no operation {operation!r}"}]}
        return {"data": method(variables)}

    def stream(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take in a piece of a run's files: history, events, summary, console output."""
        run = self.run(name)
        for file, part in (body.get("files") or {}).items():
            offset, content = part.get("offset", 0), part["content"]
            if file == "wandb-history.jsonl":
                run["history"][offset : offset + len(content)] = [json.loads(line) for line in content]
            elif file == "wandb-events.jsonl":
                run["events"] += [json.loads(line) for line in content]
            elif file == "wandb-summary.json":
                run["summary"] = json.loads(content[-1])
            elif file == "output.log":
                run["logs"] += content
        if body.get("complete"):
            run.update(complete=True, exit_code=body.get("exitcode"))
        return {"limits": {}, "stopped": False}

    # Who is asking, and of what server

    def op_Viewer(self, v: Variables) -> dict[str, Any]:
        viewer = {"id": encoded("User:1"), "entity": self.entity, "username": self.entity, "email": "a@b.c"}
        return {"viewer": {**viewer, "flags": "{}", "teams": {"edges": []}}}

    def op_GetDefaultEntity(self, v: Variables) -> dict[str, Any]:
        return self.op_Viewer(v)

    def op_ServerFeaturesQuery(self, v: Variables) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def op_ServerInfo(self, v: Variables) -> dict[str, Any]:
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}

    def op_OrganizationCoreWeaveOrganizationID(self, v: Variables) -> dict[str, Any]:
        return {"entity": None}

    def op_XXHashDigestsEnabled(self, v: Variables) -> dict[str, Any]:
        return {"entity": None}

    # Runs

    def op_RunResumeStatus(self, v: Variables) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        bucket = run and {
            "id": run["id"], "name": v["name"], "displayName": v["name"],
            "config": json.dumps(run["config"]), "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": len(run["logs"]), "historyLineCount": len(run["history"]),
            "eventsLineCount": len(run["events"]), "eventsTail": "[]",
            "historyTail": json.dumps([json.dumps(row) for row in run["history"][-1:]]),
            "tags": run.get("tags") or [], "notes": run.get("notes"), "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        entity = {"id": "e1", "name": self.entity}
        return {"model": {"id": "p1", "name": v.get("project"), "internalId": "1", "entity": entity, "bucket": bucket}}

    def op_UpsertBucket(self, v: Variables) -> dict[str, Any]:
        run = self.run(v["name"])
        inserted = not run["upserts"]
        run["upserts"].append(v)
        run["id"] = encoded(f"Run:v1:{v['name']}")
        run["project"] = v.get("project") or run.get("project")
        run.update({key: v[key] for key in RUN_ATTRIBUTES if v.get(key) is not None})
        if v.get("config"):
            run["config"].update(json.loads(v["config"]))
        bucket = {
            "id": run["id"], "name": v["name"], "displayName": run.get("displayName") or v["name"],
            "description": None, "config": json.dumps(run["config"]), "sweepName": None,
            "historyLineCount": len(run["history"]),
            "project": {"id": "p1", "name": run["project"], "entity": {"id": "e1", "name": self.entity}},
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def op_CreateRunFiles(self, v: Variables) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def op_MarkRunFilesUploaded(self, v: Variables) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def op_RunStoppedStatus(self, v: Variables) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    # Artifacts

    def op_CreateArtifact(self, v: Variables) -> dict[str, Any]:
        artifact = {"id": f"A{len(self.artifacts)}", "state": "PENDING"}
        self.artifacts[artifact["id"]] = {**v["input"], "state": "PENDING", "files": {}}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"id": "s", "latestArtifact": None}}}}

    def op_CreateArtifactManifest(self, v: Variables) -> dict[str, Any]:
        manifest = f"{v['artifactID']}/manifest"
        file = {"id": manifest, "name": v["name"], "displayName": v["name"], **self._upload(manifest)}
        return {"createArtifactManifest": {"artifactManifest": {"id": manifest, "file": file}}}

    def op_CreateArtifactFiles(self, v: Variables) -> dict[str, Any]:
        edges = []
        for file in (v.get("input") or v).get("artifactFiles", []):
            path = f"{file['artifactID']}/{file['name']}"
            node = {"id": path, "name": file["name"], "displayName": file["name"], "storagePath": path}
            node |= {"uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}, **self._upload(path)}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def op_ArtifactType(self, v: Variables) -> Variables:
        collection = v["name"].split(":")[0]
        types = {a["artifactCollectionName"]: a["artifactTypeName"] for a in self.artifacts.values()}
        known = {"artifactType": {"name": types[collection]}} if collection in types else None
        return {"project": {"artifact": known}}

    def op_CommitArtifact(self, v: Variables) -> dict[str, Any]:
        self.artifacts[v["artifactID"]]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def _upload(self, path: str) -> dict[str, Any]:
        return {"uploadUrl": f"{self.url}/upload/{quote(path)}", "uploadHeaders": []}

    # Projects and reports

    def op_GetProjects(self, v: Variables) -> dict[str, Any]:
        fixed = {"__typename": "Project", "entityName": v["entity"], "createdAt": THEN, "isBenchmark": False}
        edges = [{"node": {**fixed, "id": name, "name": name, "user": None}} for name in sorted(self._project_names())]
        return {"models": {"pageInfo": LAST_PAGE, "edges": edges}}

    def op_CreateProject(self, v: Variables) -> dict[str, Any]:
        name, entity = v["input"]["name"], v["input"]["entityName"]
        self.projects.add(name)
        project = {"id": "p1", "name": name, "entityName": entity, "description": None, "access": None, "views": "{}"}
        return {"result": {"project": project, "model": project, "inserted": True}}

    def op_ProjectInternalId(self, v: Variables) -> dict[str, Any]:
        return {"project": {"id": "p1", "internalId": PROJECT_ID}}

    def op_upsertView(self, v: Variables) -> dict[str, Any]:
        view = {key: v[key] for key in ("type", "name", "displayName", "description", "spec")}
        view["id"] = v.get("id") or encoded(f"View:{next(self.counter)}")
        view["project"] = {"id": "p1", "name": v["projectName"], "entityName": v["entityName"]}
        view["updatedAt"] = THEN
        inserted = view["id"] not in self.reports
        self.reports[view["id"]] = view
        return {"upsertView": {"view": view, "inserted": inserted}}

    def op_SpecificReport(self, v: Variables) -> dict[str, Any]:
        return {"view": {**self.reports[v["reportId"]], "createdAt": THEN}}

    def op_ProjectViews(self, v: Variables) -> dict[str, Any]:
        if v["entity"] != self.entity or v["project"] not in self._project_names():
            return {"project": None}
        edges = [
            {"node": {**view, "createdAt": THEN, "user": None}, "cursor": view["id"]}
            for view in self.reports.values()
            if view["project"]["name"] == v["project"]
        ]
        return {"project": {"allViews": {"edges": edges, "pageInfo": LAST_PAGE}}}

    def _project_names(self) -> set[str]:
        return {run["project"] for run in self.runs.values()} | self.projects


class Handler(BaseHTTPRequestHandler):
    """One connection to the stand-in."""

    protocol_version = "HTTP/1.1"

    @property
    def stub(self) -> WandbStub:
        return cast(WandbStub, self.server)

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_POST(self) -> None:
        raw = self._body()
        with self.stub.lock:
            if self.path == "/graphql":
                self._graphql(json.loads(raw))
            else:
                self._file_stream(raw)

    def do_PUT(self) -> None:
        self.stub.uploads[self.path] = self._body()
        self.stub.ops["PUT"] += 1
        self._send({})

    def do_GET(self) -> None:
        self.stub.ops[f"GET {self.path}"] += 1
        self._send({})

    def _graphql(self, request: dict[str, Any]) -> None:
        query = request["query"]
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = request.get("operationName") or (named[1] if named else "")
        self.stub.ops[operation] += 1
        status = self.stub.fail("gql", operation)
        if status:
            self._send({"errors": [{"message": "injected"}]}, status)
        else:
            self._send(self.stub.answer(operation, request.get("variables") or {}, query))

    def _file_stream(self, raw: bytes) -> None:
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        self.stub.ops["file_stream" if stream else self.path] += 1
        status = self.stub.fail("file_stream", self.path)
        if status:
            self._send({"error": "injected"}, status)
        else:
            self._send(self.stub.stream(stream[1], json.loads(raw)) if stream else {})

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _send(self, answer: dict[str, Any], status: int = 200) -> None:
        out = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)
