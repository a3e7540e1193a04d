"""A stand-in for the Hugging Face hub on this machine: one data set, one commit, and as much of its interface as
`datasets` asks for. Files come from a folder."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub:
    """Serves `folder` as data set `name` at `commit`; `asked` are the paths of all requests so far."""

    def __init__(self, folder: Path, name: str, commit: str):
        self.folder, self.name, self.commit = folder, name, commit
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                hub.answer(self, body=True, form=self.rfile.read(length))

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    def answer(self, request, body: bool, form: bytes = b"") -> None:
        path = unquote(urlparse(request.path).path)
        self.asked.append(path)
        for prefix in (f"/datasets/{self.name}/resolve/{self.commit}/",):
            if path.startswith(prefix):
                return self.send_file(request, self.folder / path.removeprefix(prefix), body)
        found = self.told(path, form)
        text = json.dumps(found if found is not None else {"error": "Entry not found"}).encode()
        request.send_response(200 if found is not None else 404)
        if found is None:
            request.send_header("X-Error-Code", "EntryNotFound" if self.commit in path else "RevisionNotFound")
        request.send_header("Content-Type", "application/json")
        self.finish(request, text, body)

    def told(self, path: str, form: bytes):
        base = f"/api/datasets/{self.name}"
        if path in (f"{base}/revision/{self.commit}", base):
            siblings = [{"rfilename": name} for name in self.files()]
            return {"id": self.name, "sha": self.commit, "siblings": siblings, "tags": [], "private": False}
        if path.startswith(f"{base}/tree/{self.commit}"):
            return self.listed(path.removeprefix(f"{base}/tree/{self.commit}").strip("/"))
        if path == f"{base}/paths-info/{self.commit}":
            from urllib.parse import parse_qs

            asked = json.loads(form)["paths"] if form.startswith(b"{") else parse_qs(form.decode())["paths"]
            return [e for e in self.listed("") if e["path"] in asked]
        return None

    def listed(self, below: str) -> list[dict]:
        found, folders = [], set()
        for name in self.files():
            if below and not name.startswith(f"{below}/"):
                continue
            folders |= {str(p) for p in Path(name).parents if str(p) != "."}
            content = (self.folder / name).read_bytes()
            oid = hashlib.sha1(content).hexdigest()
            found.append({"type": "file", "path": name, "size": len(content), "oid": oid})
        return found + [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in sorted(folders)]

    def send_file(self, request, file: Path, body: bool) -> None:
        if not file.is_file():
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound")
            return self.finish(request, b"{}", body)
        content, asked = file.read_bytes(), request.headers.get("Range", "")
        part = content
        if asked.startswith("bytes="):
            first, last = asked.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1 if last else None]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("X-Linked-Size", str(len(content)))
        request.send_header("Accept-Ranges", "bytes")
        return self.finish(request, part, body)

    def finish(self, request, content: bytes, body: bool) -> None:
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)
