# SPDX-License-Identifier: Apache-2.0
"""Images come from data URIs, or from named hosts on the public internet; never from a file."""

import io
import socket
import ssl
import struct
import threading
import zlib
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from listening import picture, uri
from PIL import Image

from vlm_jax.server import images, remote
from vlm_jax.server.options import Limits
from vlm_jax.server.refusals import Refusal

LIMITS = Limits(pixels=10_000)
HOST = "images.example.org"


def read(url, fetch=None):
    return images.pixels_of(url, "messages[0].content[1].image_url.url", LIMITS, fetch)


# --- Data URIs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "GIF", "JPEG"])
def test_a_data_uri_gives_the_pixels_of_its_file(form):
    options = dict(lossless=True) if form == "WEBP" else {}
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    with Image.open(io.BytesIO(file.getvalue())) as by_pil:
        wanted = np.asarray(by_pil.convert("RGB"))
    found = read(uri(file.getvalue(), f"image/{form.lower()}"))
    np.testing.assert_array_equal(found, wanted)


def test_a_photo_is_turned_upright():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (4, 2)).save(file, "JPEG", exif=exif)
    assert read(uri(file.getvalue())).shape == (4, 2, 3)


def bomb(width, height):
    """A PNG of a few bytes whose header promises width x height pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.parametrize(
    "url, said",
    [
        (uri(bomb(101, 100)), "101 x 100 pixels"),
        (uri(bomb(60_000, 60_000)), "pixels, and at most 10,000"),
        (uri(picture()[: len(picture()) // 2]), "cannot be decoded"),
        (uri(b"no picture at all"), "damaged, or none of PNG"),
        (uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of PNG"),
        (uri(picture(form="TIFF")), "none of PNG"),
        (uri(b"\x00"), "none of PNG"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,a", "base64"),
        ("data:image/png;base64,####", "base64"),
        ("data:image/png,abc", "the form is data:image/png;base64"),
        ("data:text/html;base64,PGI+", "the form is"),
        ("data:", "the form is"),
        ("", "no file of the server"),
        ("file:///etc/hostname", "no file of the server"),
        ("/etc/hostname", "no file of the server"),
        ("../a.png", "no file of the server"),
        ("ftp://example.org/a.png", "no file of the server"),
        ("http://example.org/a.png", "--allow-image-hosts"),
        ("https://example.org/a.png", "--allow-image-hosts"),
        ("HTTPS://example.org/a.png", "--allow-image-hosts"),
    ],
)
def test_everything_else_is_refused_with_the_field_and_the_way_out(url, said):
    with pytest.raises(Refusal, match=said) as caught:
        read(url)
    assert caught.value.param == "messages[0].content[1].image_url.url"
    assert caught.value.status == 400 and caught.value.code


# --- The web --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, allowed",
    [
        ("8.8.8.8", True), ("2606:4700:4700::1111", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::1", False), ("::", False), ("fe80::1", False),
        ("fd00::1", False), ("ff02::1", False), ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_public_internet_count(address, allowed):
    assert remote.public(address) == allowed


@pytest.mark.parametrize("host", ["", "*.example.org", "localhost", "https://a.org", "a.org:443"])
def test_hosts_are_allowed_by_their_whole_names(host):
    with pytest.raises(ValueError, match="whole name"):
        remote.check_hosts([host])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for HOST with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


class Site(BaseHTTPRequestHandler):
    """A picture, redirects, errors, and a body without an end."""

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        status = {"/moved": 302, "/gone": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"https://{HOST}/picture.png")
        self.end_headers()
        if self.path == "/endless":
            while True:
                self.wfile.write(b"0" * 4096)
        if self.path == "/slow":
            threading.Event().wait(3)
        self.wfile.write(picture(5))

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.seen, server.daemon_threads = [], True
    server.handle_error = lambda *args: None
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def web(site, certificate, *, hosts=(HOST,), allowed=lambda address: True, resolve=None, **more):
    """The web with one site in it."""
    port = site.server_address[1]

    def to_site(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    context = ssl.create_default_context(cafile=certificate)
    return remote.Web(
        hosts, 20_000, port, resolve or to_site, allowed, context, **(dict(seconds=2.0) | more)
    )


def test_a_picture_of_an_allowed_host_is_fetched(site, certificate):
    fetch = web(site, certificate)
    url = f"https://{HOST}:{fetch.port}/picture.png?size=1"
    with Image.open(io.BytesIO(picture(5))) as wanted:
        np.testing.assert_array_equal(read(url, fetch), np.asarray(wanted))
    assert site.seen[-1] == ("/picture.png?size=1", HOST)


@pytest.mark.parametrize(
    "url, said",
    [
        ("https://{host}:{port}/moved", "redirects are not followed"),
        ("https://{host}:{port}/gone", "status 404"),
        ("https://{host}:{port}/endless", "more than 20,000 bytes"),
        ("https://{host}:{port}/slow", "could not be fetched"),
        ("https://{host}:1/picture.png", "without a user or a port"),
        ("https://user@{host}:{port}/picture.png", "without a user or a port"),
        ("https://other.example.org:{port}/picture.png", "alone"),
        ("https://{host}.evil.org:{port}/picture.png", "alone"),
        ("https://127.0.0.1:{port}/picture.png", "alone"),
        ("https://{host}:{port}/a b", "quote them"),
        ("https://{host}:{port}/a\r\nX: y", "quote them|without a user"),
        ("https://{host}:99999/", "cannot be read"),
        ("http://{host}:{port}/picture.png", "use https"),
    ],
)
def test_nothing_else_is_fetched(site, certificate, url, said):
    fetch = web(site, certificate, seconds=0.7)
    with pytest.raises(Refusal, match=said):
        read(url.format(host=HOST, port=fetch.port), fetch)


def test_a_name_with_one_private_address_is_not_connected_to(site, certificate):
    seen = len(site.seen)

    def both(host, port, **_):
        return [(2, 1, 6, "", (address, port)) for address in ("8.8.8.8", "127.0.0.1")]

    for fetch in (
        web(site, certificate, allowed=remote.public),
        web(site, certificate, allowed=remote.public, resolve=both),
        web(site, certificate, resolve=lambda *a, **k: []),
    ):
        with pytest.raises(Refusal, match="not on the public internet"):
            read(f"https://{HOST}:{fetch.port}/picture.png", fetch)
    assert len(site.seen) == seen


def test_the_address_that_was_checked_is_the_one_that_is_used(site, certificate):
    """A name is resolved once: a second answer, which may be another, is never asked for."""
    asked = []

    def once(host, port, **_):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    fetch = web(site, certificate, resolve=once)
    read(f"https://{HOST}:{fetch.port}/picture.png", fetch)
    assert asked == [HOST]


def test_a_host_without_its_certificate_is_not_believed(site, certificate):
    other = web(site, certificate, hosts=("other.example.org",))
    with pytest.raises(Refusal, match="SSLCertVerificationError"):
        read(f"https://other.example.org:{other.port}/picture.png", other)


def test_a_proxy_of_the_environment_is_not_used(site, certificate, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetch = web(site, certificate)
    assert read(f"https://{HOST}:{fetch.port}/picture.png", fetch).shape == (8, 8, 3)
