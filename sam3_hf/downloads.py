"""One picture from a URL, without ways into the network that the program runs in."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import urllib.parse
from typing import NamedTuple

MAX_BYTES = 100 * 2**20
TIMEOUT = 20.0  # seconds in which a server must say something
TOTAL_TIMEOUT = 120.0  # seconds for a whole answer
MAX_REDIRECTS = 5
SCHEMES = {"http": 80, "https": 443}
# Servers of plain files often do not know better than the last two.
CONTENT_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
_REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses whose last 32 bits are an IPv4 address: of NAT64, and as they once were.
_NAT64, _COMPATIBLE = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")


class _Target(NamedTuple):
    scheme: str
    host: str
    port: int
    path: str  # with the query
    url: str  # as shown in messages


def is_url(source: str) -> bool:
    """Whether a text is a URL of any scheme, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def download(
    url: str, *, private_addresses: bool = False, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT
) -> bytes:
    """
    The content of an `http` or `https` URL, which must call itself a picture. Proxies are not used.

    Args:
        private_addresses: also connect to addresses that are not public: those of this machine and of local networks.
            It is the address connected to that is checked, of the first server and after every redirect.
        max_bytes: largest content.
        timeout: seconds in which the server must answer, and go on answering.

    Raises:
        OSError: it cannot be had, or must not be; the message names the URL.
    """
    place = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            target = _parse(place)
            content = _get(target, private_addresses, max_bytes, timeout)
            if isinstance(content, bytes):
                return content
            place = urllib.parse.urljoin(target.url, content)
            _check_redirect(target, place)
        raise OSError(f"it redirects more than {MAX_REDIRECTS} times")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = "it took too long to answer" if isinstance(error, TimeoutError) else str(error) or repr(error)
        via = "" if place == url else f" (redirected to {_shown(place)})"
        raise OSError(f"cannot download {_shown(url)}{via}: {reason}") from error


def _parse(url: str) -> _Target:
    parts = urllib.parse.urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme not in SCHEMES:
        raise ValueError(f"only {' and '.join(SCHEMES)} are read, not {scheme!r}")
    if not parts.hostname:
        raise ValueError("it names no server")
    if parts.username is not None or parts.password is not None:
        raise ValueError("names and passwords in URLs are not sent: download it yourself")
    path = urllib.parse.quote(parts.path or "/", safe="%/:=&?~+!$,;'@()*[]")
    query = urllib.parse.quote(parts.query, safe="%/:=&?~+!$,;'@()*[]")
    return _Target(scheme, parts.hostname, parts.port or SCHEMES[scheme], path + (f"?{query}" if query else ""), url)


def _check_redirect(source: _Target, url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    if scheme != source.scheme and (source.scheme, scheme) != ("http", "https"):
        raise ValueError(f"a redirect from {source.scheme} to {scheme!r} is not followed")


def _get(target: _Target, private_addresses: bool, max_bytes: int, timeout: float) -> bytes | str:
    """The content, or where a redirect leads."""
    connection = _connect(target, private_addresses, timeout)
    server = connection.sock  # the connection forgets it before the content is read
    overdue = threading.Event()

    def interrupt():
        overdue.set()
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(server, socket.SHUT_RDWR)

    # A time-out of the socket starts anew with every byte; this one is for servers that send a byte now and then.
    watch = threading.Timer(TOTAL_TIMEOUT, interrupt)
    watch.daemon = True
    try:
        watch.start()
        connection.request("GET", target.path, headers={"User-Agent": "sam3-hf", "Accept": "image/*"})
        content = _answer(connection.getresponse(), max_bytes)
    except (OSError, http.client.HTTPException) as error:
        raise TimeoutError() if overdue.is_set() else error from error
    finally:
        watch.cancel()
        connection.close()
    if overdue.is_set():  # what was interrupted may look like an end
        raise TimeoutError()
    return content


def _answer(response: http.client.HTTPResponse, max_bytes: int) -> bytes | str:
    with response:
        if response.status in _REDIRECTS:
            return _location(response)
        _check_head(response, max_bytes)
        return _body(response, max_bytes)


def _connect(target: _Target, private_addresses: bool, timeout: float) -> http.client.HTTPConnection:
    """A connection to an address of the server that was checked: asking for its name again could give another one."""
    try:
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"there is no server {target.host} ({error.strerror})") from error
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    private = [address for address in addresses if not is_public(address)]
    if private and not private_addresses:
        raise OSError(
            f"{target.host} is at the private address {private[0]}; to allow that, "
            "`sam3_hf.reading.read_image(url, private_addresses=True)`"
        )
    kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
    connection = kind(target.host, target.port, timeout=timeout)
    for index, address in enumerate(addresses):
        try:
            plain = socket.create_connection((address, target.port), timeout)
            break
        except OSError:
            if index == len(addresses) - 1:
                raise
    if target.scheme == "http":
        connection.sock = plain
        return connection
    try:
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise
    return connection


def is_public(address: str) -> bool:
    """Whether an IP address is of the public internet: not of this machine, a local network or a group."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64 or ip in _COMPATIBLE:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast


def _location(response: http.client.HTTPResponse) -> str:
    location = response.getheader("Location")
    if not location:
        raise OSError(f"the server answered {response.status} without saying where to go")
    # Headers are read as Latin-1; many servers send UTF-8.
    return location.encode("latin-1").decode("utf-8", "replace")


def _check_head(response: http.client.HTTPResponse, max_bytes: int) -> None:
    if response.status != 200:
        raise OSError(f"the server answered {response.status} {response.reason}")
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if not kind.startswith(CONTENT_TYPES):
        raise OSError(f"it is no picture, but {kind or 'of an unnamed type'}")
    if response.getheader("Content-Encoding", "identity").lower() != "identity":
        raise OSError("the server sent it compressed, which it was not asked for")
    if response.length is not None and response.length > max_bytes:
        raise OSError(f"it has {response.length} bytes, more than {max_bytes}")


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    content = response.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(f"it has more than {max_bytes} bytes")
    if response.length:
        raise OSError(f"the connection broke, {response.length} bytes before the end")
    return content


def _shown(url: str) -> str:
    """A URL for a message, without a name and password."""
    return re.sub(r"//[^/?#]*@", "//", url)
