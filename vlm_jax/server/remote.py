# SPDX-License-Identifier: Apache-2.0
"""Pictures from the web, from named hosts alone: https, no redirect, no private address.

A name is resolved once, every address it has is checked, and the connection goes to a checked
address: a name whose address changes between a check and a connection gains nothing. Proxies of the
environment are not used, because a proxy would resolve the name again.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vlm_jax.server.refusals import Refusal

SECONDS = 10.0  # for a whole picture
CHUNK = 2**16
# Of translators to version 4 (RFC 6052, RFC 8215).
TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48")))


def public(address: str) -> bool:
    """Whether an address belongs to the public internet: not to this machine or its network."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        # Addresses of version 4 inside those of version 6 would lead to any machine.
        inside = (found.ipv4_mapped, found.sixtofour, found.teredo)
        if any(inside) or any(found in network for network in TRANSLATED):
            return False
    return found.is_global and not found.is_multicast


def check_hosts(hosts: list[str]) -> tuple[str, ...]:
    """The names of --allow-image-hosts. Raises ValueError for anything but whole names of hosts."""
    for host in hosts:
        if not host or any(letter in host for letter in "/:*@ ") or "." not in host.strip("."):
            raise ValueError(
                f"--allow-image-hosts={','.join(hosts)}: {host!r} is no name of a host such as "
                "images.example.org, each host by its whole name"
            )
    return tuple(host.lower().rstrip(".") for host in hosts)


@dataclass(frozen=True)
class Web:
    """Gets pictures from `hosts`, at most `most` bytes each.

    `resolve` is socket.getaddrinfo, `allowed` says whether an address may be used, and `context` is
    that of TLS; tests have their own.
    """

    hosts: tuple[str, ...]
    most: int
    port: int = 443
    resolve: Callable[..., list[Any]] = socket.getaddrinfo
    allowed: Callable[[str], bool] = public
    context: ssl.SSLContext | None = None
    seconds: float = SECONDS

    def __call__(self, url: str) -> bytes:
        """The bytes at a url. Raises Refusal for everything that is not allowed or fails."""
        host, target = self._parts(url)
        until = time.monotonic() + self.seconds
        try:
            return self._get(host, self._address(host), target, until)
        except (OSError, http.client.HTTPException) as error:
            # Which address a name has, and why it does not answer, is nobody's business.
            raise _refused(
                f"the picture at {host} could not be fetched ({type(error).__name__}): send it as "
                "a data URI"
            ) from None

    def _parts(self, url: str) -> tuple[str, str]:
        """Host and target of a url that is allowed."""
        try:
            parts = urlsplit(url)
            port = parts.port or self.port
        except ValueError:
            raise _refused("the url of the image cannot be read: send a data URI") from None
        host = (parts.hostname or "").rstrip(".")
        if parts.scheme != "https" or parts.username is not None or port != self.port:
            raise _refused("a picture is fetched from https://HOST/PATH, without a user or a port")
        if host not in self.hosts:
            raise _refused(
                f"pictures are fetched from {', '.join(self.hosts)} alone: send a data URI, or ask "
                "the operator for --allow-image-hosts"
            )
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(letter <= " " or letter == "\x7f" for letter in target):
            raise _refused("the path of the url has letters that need quoting: quote them")
        return host, target

    def _address(self, host: str) -> str:
        """An address of the host, if all it has are public."""
        found = [entry[4][0] for entry in self.resolve(host, self.port, type=socket.SOCK_STREAM)]
        if not found or not all(self.allowed(address) for address in found):
            raise _refused(f"{host} is not on the public internet: send the picture as a data URI")
        return found[0]

    def _get(self, host: str, address: str, target: str, until: float) -> bytes:
        """The body of the response of an address."""
        context = self.context or ssl.create_default_context()
        with (
            socket.create_connection((address, self.port), timeout=_left(until)) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            connection = http.client.HTTPConnection(host, self.port)
            connection.sock = secure
            headers = {"Accept": "image/*", "Host": host, "Connection": "close"}
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(
                    f"{host} answers with status {response.status}, and redirects are not "
                    "followed: give the address of the picture itself"
                )
            content = bytearray()
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > self.most:
                    raise _refused(f"the picture at {host} has more than {self.most:,} bytes: make "
                                   "it smaller")  # fmt: skip
                secure.settimeout(_left(until))
            return bytes(content)


def _left(until: float) -> float:
    """The seconds that are left; TimeoutError if none are."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("the picture took too long")
    return left


def _refused(message: str) -> Refusal:
    return Refusal(message, code="invalid_image_url")
