"""A real server on loopback that speaks the routes of the Hugging Face hub that write and read repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from huggingface_hub import ModelCard


class Hub:
    """Repositories in memory: name → commits, each with the files as they are then.

    Attributes:
        large: files whose names end like this go through LFS, as binary files do on the hub.
        before_commit: called before a commit is taken, as others may come between.
    """

    TOKEN = "hf_secret"

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.stored: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.large = (".safetensors", ".patch")
        self.before_commit = lambda: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def _say(self, status: int, value=None, content: bytes = b"", **headers: str) -> None:
                content = json.dumps(value).encode() if value is not None else content
                self.send_response(status)
                for name, text in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), text)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _missing(self, what: str) -> None:
                self._say(404, {"error": what}, X_Error_Code=what)

            def do_GET(self):
                path, query = unquote(urlparse(self.path).path), parse_qs(urlparse(self.path).query)
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                    repository, what, revision = found.groups()
                    if repository not in hub.commits:
                        return self._missing("RepoNotFound")
                    if (commit := hub.at(repository, revision)) is None:
                        return self._missing("RevisionNotFound")
                    sha, files = commit
                    if what == "tree":
                        assert query["recursive"] == ["true"], self.path
                        return self._say(200, [hub.entry(name, content) for name, content in files.items()])
                    siblings = [{"rfilename": name} for name in files]
                    return self._say(200, {"id": repository, "sha": sha, "siblings": siblings, "private": False})
                if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    repository, revision, name = found.groups()
                    commit = hub.at(repository, revision)
                    if commit is None or name not in commit[1]:
                        return self._missing("EntryNotFound" if commit else "RepoNotFound")
                    content = commit[1][name]
                    etag = f'"{hashlib.sha256(content).hexdigest()}"'
                    return self._say(200, content=content, ETag=etag, X_Repo_Commit=commit[0])
                self._say(400, {"error": f"no such route: GET {self.path}"})

            do_HEAD = do_GET

            def do_POST(self):
                body, path = self._body(), unquote(urlparse(self.path).path)
                if self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
                    return self._say(401, {"error": "Invalid username or password."})
                if path == "/api/validate-yaml":
                    ModelCard(json.loads(body)["content"])
                    return self._say(200, {"errors": [], "warnings": []})
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    if name in hub.commits:
                        return self._say(409, {"error": "You already created this model repo", "url": hub.url(name)})
                    hub.commits[name] = [(hub.sha(), {".gitattributes": b"*.patch lfs\n"})]
                    return self._say(200, {"url": hub.url(name), "name": name})
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(hub.large) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self._say(200, {"files": files})
                if re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                    objects = []
                    for each in json.loads(body)["objects"]:
                        upload = {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}
                        objects.append({**each, **({} if each["oid"] in hub.stored else {"actions": upload})})
                    return self._say(200, {"transfer": "basic", "objects": objects})
                if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
                    return self._commit(found.group(1), [json.loads(line) for line in body.splitlines()])
                self._say(400, {"error": f"no such route: POST {self.path}"})

            def _commit(self, repository: str, lines: list[dict]) -> None:
                hub.before_commit()
                sha, files = hub.commits[repository][-1]
                files = dict(files)
                for line in lines:
                    value = line["value"]
                    match line["key"]:
                        case "header":
                            hub.messages.append(value["summary"])
                            if value.get("parentCommit", sha) != sha:
                                return self._say(412, {"error": "A commit has happened since. Please refresh."})
                        case "file":
                            files[value["path"]] = base64.b64decode(value["content"])
                        case "lfsFile":
                            files[value["path"]] = hub.stored[value["oid"]]
                        case "deletedFile":
                            del files[value["path"]]
                        case _:
                            return self._say(400, {"error": line["key"]})
                hub.commits[repository].append((hub.sha(), files))
                new = hub.commits[repository][-1][0]
                self._say(
                    200, {"success": True, "commitOid": new, "commitUrl": f"{hub.url(repository)}/commit/{new}"}
                )

            def do_PUT(self):
                content = self._body()
                oid = self.path.rpartition("/")[2]
                assert hashlib.sha256(content).hexdigest() == oid
                hub.stored[oid] = content
                self._say(200, content=b"")

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def sha(self) -> str:
        """A name for the next commit."""
        return hashlib.sha1(str(sum(map(len, self.commits.values()))).encode()).hexdigest()

    def url(self, repository: str) -> str:
        return f"{self.endpoint}/{repository}"

    def at(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repository, [])
        if revision in (None, "main"):
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)

    def entry(self, name: str, content: bytes) -> dict:
        oid = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if name.endswith(self.large) else {}
        return {"type": "file", "path": name, "size": len(content), "oid": oid[:40], **lfs}
