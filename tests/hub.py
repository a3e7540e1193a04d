"""A stand-in for the Hugging Face hub on this machine: some data sets and models at a commit each, and as much of its
interface as `datasets` and `hf download` ask for. Files come from folders."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse


class Hub:
    """Serves each folder as the data set or model of its name ('datasets/…', 'models/…') and commit; a model also as
    'main'. `asked` are the paths of all requests so far."""

    def __init__(self, sets: dict[tuple[str, str], Path]):
        self.sets = sets
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

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for whoever is to take this for the hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def answer(self, request, body: bool, form: bytes = b"") -> None:
        path = unquote(urlparse(request.path).path)
        self.asked.append(path)
        found = None
        for (name, commit), folder in self.sets.items():
            for revision in (commit, "main") if name.startswith("models/") else (commit,):
                prefix = f"/{name.removeprefix('models/')}/resolve/{revision}/"  # models are at the top
                if path.startswith(prefix):
                    return self.send_file(request, folder / path.removeprefix(prefix), body, commit)
            if path.startswith(f"/api/{name}"):
                found = told(path.removeprefix(f"/api/{name}"), form, name.partition("/")[2], commit, folder)
        text = json.dumps(found if found is not None else {"error": "Entry not found"}).encode()
        request.send_response(200 if found is not None else 404)
        if found is None:
            known = any(commit in path for _, commit in self.sets)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RevisionNotFound")
        request.send_header("Content-Type", "application/json")
        self.finish(request, text, body)

    def send_file(self, request, file: Path, body: bool, commit: str) -> None:
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
        request.send_header("X-Repo-Commit", commit)
        request.send_header("X-Linked-Size", str(len(content)))
        request.send_header("Accept-Ranges", "bytes")
        return self.finish(request, part, body)

    def finish(self, request, content: bytes, body: bool) -> None:
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def told(path: str, form: bytes, name: str, commit: str, folder: Path):
    """What the interface says below an address; None: nothing."""
    if path in (f"/revision/{commit}", ""):
        siblings = [{"rfilename": file} for file in files_of(folder)]
        return {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False}
    if path.startswith(f"/tree/{commit}"):
        return listed(folder, path.removeprefix(f"/tree/{commit}").strip("/"))
    if path == f"/paths-info/{commit}":
        asked = json.loads(form)["paths"] if form.startswith(b"{") else parse_qs(form.decode())["paths"]
        return [entry for entry in listed(folder, "") if entry["path"] in asked]
    return None


def listed(folder: Path, below: str) -> list[dict]:
    found, folders = [], set()
    for name in files_of(folder):
        if below and not name.startswith(f"{below}/"):
            continue
        folders |= {str(p) for p in Path(name).parents if str(p) != "."}
        content = (folder / name).read_bytes()
        found.append({"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
    return found + [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in sorted(folders)]
