# SPDX-License-Identifier: Apache-2.0
"""A server in this process that speaks as much of the JSON protocol of Google Cloud Storage as
gcsfs and tensorstore use: objects appear whole, under conditions on their generation, or not at
all.

It was written from the published protocol, and is no proof of what the real one does.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c


class Bucket:
    """Objects by name: content and generation. `failing` names those that cannot be written."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generation, self.lock = 1, threading.Lock()
        self.failing = lambda name: False
        self.uploads: dict[str, tuple[str, dict, bytearray]] = {}

    def put(self, name, data, condition=None):
        """The new generation, 0 where the condition is not met."""
        with self.lock:
            _, now = self.objects.get(name, (b"", 0))
            if condition is not None and now != int(condition):
                return 0
            self.generation += 1
            self.objects[name] = data, self.generation
            return self.generation


def described(bucket, name):
    data, generation = bucket.objects[name]
    crc = google_crc32c.Checksum(data).digest()
    return dict(
        kind="storage#object", id=f"a-bucket/{name}/{generation}", name=name, bucket="a-bucket",
        generation=str(generation), metageneration="1", size=str(len(data)),
        contentType="application/octet-stream", updated="2026-01-01T00:00:00.000Z",
        timeCreated="2026-01-01T00:00:00.000Z", etag=f"e{generation}",
        md5Hash=base64.b64encode(hashlib.md5(data).digest()).decode(),
        crc32c=base64.b64encode(crc).decode(),
    )  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", kind="application/json", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, what):
        self.answer(code, {"error": {"code": code, "message": what, "errors": [{"reason": what}]}})

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self):
        url = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        data, bucket = self.body(), self.server.bucket
        path = re.sub(r"^/(upload/|download/|resumable/upload/)?storage/v1", "", url.path)
        if self.command in ("POST", "PUT") and "uploadType" in query:
            return self.upload(bucket, query, data)
        if path == "/b/a-bucket":
            return self.answer(
                200, {"kind": "storage#bucket", "name": "a-bucket", "id": "a-bucket"}
            )
        if path == "/b/a-bucket/o" and self.command == "GET":
            return self.answer(200, self.listed(bucket, query))
        if found := re.fullmatch(
            r"/b/a-bucket/o/([^/]+)/(?:rewriteTo|copyTo)/b/a-bucket/o/([^/]+)", path
        ):
            source, target = map(unquote, found.groups())
            if source not in bucket.objects:
                return self.refuse(404, "notFound")
            bucket.put(target, bucket.objects[source][0])
            return self.answer(200, {"done": True, "resource": described(bucket, target)})
        if found := re.fullmatch(r"/b/a-bucket/o/([^/]+)/moveTo/o/([^/]+)", path):
            source, target = map(unquote, found.groups())
            if source not in bucket.objects:
                return self.refuse(404, "notFound")
            bucket.put(target, bucket.objects.pop(source)[0])
            return self.answer(200, described(bucket, target))
        if found := re.fullmatch(r"/b/a-bucket/o/([^/]+)", path):
            return self.object(bucket, unquote(found[1]), query)
        return self.refuse(404, f"notFound {self.command} {self.path}")

    def object(self, bucket, name, query):
        with bucket.lock:
            found = bucket.objects.get(name)
            if found is None:
                return self.refuse(404, "notFound")
            data, generation = found
            if self.command == "DELETE":
                if query.get("ifGenerationMatch", str(generation)) != str(generation):
                    return self.refuse(412, "conditionNotMet")
                del bucket.objects[name]
                return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, described(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304, x_goog_generation=str(generation))
        code, extra = 200, {}
        if ranged := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = ranged.groups()
            start = int(first) if first else len(data) - int(last)
            stop = int(last) + 1 if last and first else len(data)
            if start >= len(data):
                return self.answer(416)
            extra["Content_Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, code = data[start:stop], 206
        kind = "application/octet-stream"
        return self.answer(code, data, kind, x_goog_generation=str(generation), **extra)

    def listed(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        with bucket.lock:
            names = sorted(n for n in bucket.objects if n.startswith(prefix))
            names = [n for n in names if n >= query.get("startOffset", "")]
            if "endOffset" in query:
                names = [n for n in names if n < query["endOffset"]]
            items, prefixes = [], set()
            for name in names:
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(described(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def upload(self, bucket, query, data):
        kind = query["uploadType"]
        if kind == "resumable" and "upload_id" not in query:
            name = query.get("name") or json.loads(data)["name"]
            number = str(len(bucket.uploads))
            bucket.uploads[number] = name, query, bytearray()
            where = (
                f"http://{self.headers['Host']}/upload/storage/v1/b/a-bucket/o?uploadType=resumable"
            )
            return self.answer(200, {}, Location=f"{where}&upload_id={number}&name={quote(name)}")
        if kind == "resumable":
            name, query, sofar = bucket.uploads[query["upload_id"]]
            sofar += data
            if self.headers["Content-Range"].endswith("/*"):
                return self.answer(308, Range=f"bytes=0-{len(sofar) - 1}")
            data = bytes(sofar)
        elif kind == "multipart":
            mark = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, about, content, *_ = data.split(b"--" + mark)
            name = json.loads(
                about.partition(b"\n\n" if b"\r\n\r\n" not in about else b"\r\n\r\n")[2]
            )
            name = name["name"]
            split = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            data = content.partition(split)[2]
            data = data.removesuffix(b"\r\n") if split == b"\r\n\r\n" else data.removesuffix(b"\n")
        else:
            name = query["name"]
        if bucket.failing(name):
            return self.refuse(403, "quotaExceeded")
        if not bucket.put(name, data, query.get("ifGenerationMatch")):
            return self.refuse(412, "conditionNotMet")
        return self.answer(200, described(bucket, name))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        pass  # a client that is gone


@contextmanager
def serving():
    """The bucket gs://a-bucket, and the environment in which a process finds it there."""
    server = Server(("localhost", 0), Handler)
    server.bucket = Bucket()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "TENSORSTORE_GCS_HTTP_URL": url,  # tensorstore
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
    }
    try:
        yield server.bucket, environment
    finally:
        server.shutdown()
        server.server_close()
