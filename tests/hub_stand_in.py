"""A hub on loopback, as much of it as the real client needs to create, fill, list and download a model repository.

Large files go the way of git LFS, in one piece or, with `chunk_bytes`, in parts; with `xet`, as the client does it by
default, into content-addressed storage (of chunks that could not be compressed: tests use random bytes). Everything
that arrives is kept in `requests`, so that a test can search all of it; `drop` and `fail` make it misbehave.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from urllib.parse import parse_qs, unquote, urlsplit


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    private: bool
    files: dict = field(default_factory=dict)  # path -> (content, stored as a large file)
    commits: list = field(default_factory=list)  # (id, files at that moment, message)

    def commit(self, message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((name, dict(self.files), message))
        return name

    def edit(self, path: str, content: bytes | None, large: bool = False) -> None:
        """What a person does on the web page: one file written, or removed (None), in a commit."""
        self.files[path] = (content, large)
        if content is None:
            del self.files[path]
        self.commit(f"edit {path}")

    def at(self, revision: str) -> dict:
        """The files at a commit or a branch."""
        return next((files for name, files, _ in self.commits if name == revision), self.files)


@dataclass
class Request:
    method: str
    path: str
    headers: dict
    body: bytes
    status: int = 0


class HubStandIn:
    """`with HubStandIn() as hub:` serves at hub.address. users: token -> (name, may write)."""

    def __init__(self, large=r".*\.(safetensors|png)", chunk_bytes: int = 0, xet: bool = False):
        self.users = {"hf_writer": ("ann", True), "hf_reader": ("ann", False), "hf_other": ("bob", True)}
        self.large, self.chunk_bytes, self.xet = large, chunk_bytes, xet
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.chunks: list[bytes] = []  # of Xet, since the last file was complete
        self.requests: list[Request] = []
        self.faults: list[list] = []  # [method, path pattern, kind or None, how often]
        self.lock = threading.Lock()

    def __enter__(self):
        stand_in = self

        class Handler(HubHandler):
            hub = stand_in

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1000, after: int = 0) -> None:
        """Answer the next requests of this kind with an error status; the first `after` of them go well."""
        self.faults += [[method, path, None, after], [method, path, status, times]]

    def drop(self, method: str, path: str, times: int = 1000) -> None:
        """Read a third of the body of the next requests of this kind, then close the connection."""
        self.faults.append([method, path, "drop", times])

    def answer_lost(self, method: str, path: str, times: int = 1) -> None:
        """Do what is asked, then close the connection without an answer."""
        self.faults.append([method, path, "lost", times])

    def fault(self, method: str, path: str):
        for entry in self.faults:
            if entry[0] == method and re.fullmatch(entry[1], path) and entry[3] > 0:
                entry[3] -= 1
                return entry[2]
        return None

    def stored_bytes(self) -> int:
        """How many bytes of large files have arrived and were accepted."""
        stored = [r for r in self.requests if r.status == 200 and (r.method == "PUT" or "/v1/xorbs/" in r.path)]
        return sum(len(r.body) for r in stored)

    def everything(self) -> bytes:
        """All that was ever sent here: addresses, headers, bodies, and what base64 hides in them."""
        pieces = []
        for request in self.requests:
            pieces += [request.path.encode(), json.dumps(request.headers).encode(), request.body]
            for line in request.body.split(b"\n"):
                if b'"base64"' in line:
                    pieces.append(base64.b64decode(json.loads(line)["value"]["content"]))
        return b"\n".join(pieces)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: otherwise each answer waits 40 ms for an acknowledgement
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self):
        self.split = urlsplit(self.path)
        fault = self.hub.fault(self.command, self.split.path)
        body = self.read_body(fault)
        self.request_record = Request(self.command, self.path, dict(self.headers), body)
        with self.hub.lock:
            self.hub.requests.append(self.request_record)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            said = f"told to fail, and to repeat what it heard: {self.headers.get('Authorization')}"
            self.refuse(fault, said)
        elif fault == "lost":
            self.answer = lambda *args, **kwargs: None
            self.route(body)
            self.close_connection = True
            self.connection.close()
        else:
            self.route(body)

    def read_body(self, fault) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 3 if fault == "drop" else length)

    def answer(self, status: int, content=None, headers=None, data: bytes | None = None):
        self.request_record.status = status
        data = json.dumps(content).encode() if data is None else data
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, message: str, code: str = ""):
        self.answer(
            status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        )

    # what is asked for

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/[^/]+", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("PUT", r"/storage/([0-9a-f]{64})(?:/(\d+))?", "store"),
        ("POST", r"/storage/([0-9a-f]{64})/complete", "complete"),
        ("POST", r"/storage/([0-9a-f]{64})/verify", "verify"),
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/[^/]+", "xet_token"),
        ("POST", r"/v1/xorbs/default/[0-9a-f]{64}", "xet_chunks"),
        ("POST", r"/v1/shards", "xet_file"),
    )

    def route(self, body: bytes):
        for method, pattern, name in self.ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, self.split.path)):
                arguments = [unquote(group) if group else group for group in match.groups()]
                if name in ("store", "complete"):  # signed addresses: no token
                    return getattr(self, name)(body, *arguments)
                if name.startswith("xet") and not self.hub.xet:
                    break
                if name in ("xet_chunks", "xet_file"):  # a token of their own
                    good = self.headers.get("Authorization") == "Bearer token-of-the-storage"
                    return getattr(self, name)(body) if good else self.refuse(401, "not the storage's token")
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in self.hub.users:
                    return self.refuse(401, "Invalid credentials in Authorization header")
                self.user, self.may_write = self.hub.users[token]
                if name in ("whoami", "create", "validate", "verify"):
                    return getattr(self, name)(body, *arguments)
                repository = self.hub.repositories.get(arguments[0])
                if repository is None or (repository.private and not arguments[0].startswith(f"{self.user}/")):
                    return self.refuse(404, "Repository not found", "RepoNotFound")
                if name in ("preupload", "commit", "batch", "xet_token") and not self.owns(arguments[0]):
                    return self.refuse(403, f"you may not write to {arguments[0]}")
                return getattr(self, name)(body, repository, *arguments)
        return self.refuse(404, f"the stand-in has no {self.command} {self.split.path}")

    def owns(self, name: str) -> bool:
        return self.may_write and name.startswith(f"{self.user}/")

    def whoami(self, body):
        self.answer(200, {"type": "user", "name": self.user, "auth": {"type": "access_token"}, "orgs": []})

    def create(self, body):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if not self.owns(name):
            return self.refuse(403, "you may not create a repository here")
        address = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **address})
        repository = Repository(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repository.files[".gitattributes"] = (b"*.safetensors filter=lfs\n", False)
        repository.commit("initial commit")
        self.hub.repositories[name] = repository
        return self.answer(200, address)

    def validate(self, body):
        text = json.loads(body)["content"]
        good = text.startswith("---\n") and "\n---\n" in text[4:]
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "no front matter"}], "warnings": []})

    def info(self, body, repository, name):
        self.answer(200, {"id": name, "sha": repository.commits[-1][0], "private": repository.private, "siblings": []})

    def entry(self, path, content, large):
        oid = hashlib.sha256(content).hexdigest()
        pointer = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if large else {}
        return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content), **pointer}

    def tree(self, body, repository, name, revision):
        """Two entries a page, so that the client has to turn pages."""
        files = sorted(repository.at(revision).items())
        entries = [self.entry(path, *file) for path, file in files]
        entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in
                    sorted({path.rpartition("/")[0] for path, _ in files} - {""})]  # fmt: skip
        start = int(parse_qs(self.split.query).get("cursor", ["0"])[0])
        link = f'<{self.hub.address}{self.split.path}?recursive=true&cursor={start + 2}>; rel="next"'
        self.answer(200, entries[start : start + 2], {"Link": link} if start + 2 < len(entries) else {})

    def preupload(self, body, repository, name):
        files = []
        for file in json.loads(body)["files"]:
            large = bool(re.fullmatch(self.hub.large, file["path"]))
            known = repository.files.get(file["path"])
            oid = known and (hashlib.sha256(known[0]).hexdigest() if known[1] else blob_id(known[0]))
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, body, repository, name):
        objects = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            storage = f"{self.hub.address}/storage/{oid}"
            actions = {"upload": {"href": storage}, "verify": {"href": f"{storage}/verify"}}
            if self.hub.chunk_bytes and size > self.hub.chunk_bytes:
                parts = range(1, ceil(size / self.hub.chunk_bytes) + 1)
                header = {f"{part}": f"{storage}/{part}" for part in parts}
                header["chunk_size"] = str(self.hub.chunk_bytes)
                actions["upload"] = {"href": f"{storage}/complete", "header": header}
            objects.append({"oid": oid, "size": size, **({} if oid in self.hub.blobs else {"actions": actions})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, oid, part=None):
        if part is None:
            if hashlib.sha256(body).hexdigest() != oid:
                return self.refuse(400, "the content has another sha256")
            self.hub.blobs[oid] = body
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        return self.answer(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body, oid):
        sent = json.loads(body)["parts"]
        parts = [self.hub.parts[oid][part["partNumber"]] for part in sent]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        content = b"".join(parts)
        if [part["etag"] for part in sent] != etags or hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "the parts do not make up the content")
        self.hub.blobs[oid] = content
        return self.answer(200, {})

    def verify(self, body, oid):
        here = len(self.hub.blobs.get(oid, b"")) == json.loads(body)["size"]
        self.answer(200 if here else 404, {})

    def xet_token(self, body, repository, name):
        expires = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.hub.address, "X-Xet-Access-Token": "token-of-the-storage"}
        content = {"casUrl": self.hub.address, "accessToken": "token-of-the-storage", "exp": expires}
        self.answer(200, content, {**headers, "X-Xet-Token-Expiration": str(expires)})

    def xet_chunks(self, body):
        """Chunks: version, three bytes of length as stored, kind of compression, three bytes of length; the content."""
        position = 0
        while position < len(body):
            stored, compression = int.from_bytes(body[position + 1 : position + 4], "little"), body[position + 4]
            if compression:
                return self.refuse(400, "the stand-in reads chunks without compression only")
            self.hub.chunks.append(body[position + 8 : position + 8 + stored])
            position += 8 + stored
        return self.answer(200, {"was_inserted": True})

    def xet_file(self, body):
        """The chunks since the last file are this one: the client sends one file at a time."""
        content = b"".join(self.hub.chunks)
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.hub.chunks.clear()
        self.answer(200, {"result": 1})

    def commit(self, body, repository, name):
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, repository.commits[-1][0]):
            return self.refuse(412, "A commit has happened since")
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = (self.hub.blobs[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    return self.refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                return self.refuse(400, f"the stand-in has no {operation['key']}")
        repository.files = files
        commit = repository.commit(header["value"]["summary"])
        return self.answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, body, repository, name, revision, path):
        files = repository.at(revision)
        if path not in files:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        content, large = files[path]
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else repository.commits[-1][0]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        return self.answer(200, headers=headers, data=content)
