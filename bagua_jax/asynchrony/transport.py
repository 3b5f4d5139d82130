"""Where workers of pair gossip listen, whom they believe, and how large a message is.

Sockets are ZeroMQ's, encrypted and authenticated by CURVE in both directions. The key
is derived from a secret that all workers share, and is never sent.
"""

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from bagua_jax import extras
from bagua_jax.asynchrony.door import PROOF_S, Door

__all__ = ["Server", "endpoint", "require_secret", "require_zmq"]

_FOLDER = "bagua-jax-"  # in the system's folder of temporary files
_LEAST_SECRET = 16
_ENVELOPE = 256  # what CURVE adds to a message is less


def require_zmq() -> Any:
    """Import pyzmq, or say how to get it."""
    try:
        import zmq
    except ModuleNotFoundError as error:
        raise ImportError(extras.missing(error, "PairGossip")) from None
    return zmq


def require_secret(secret: bytes) -> None:
    """Refuse a secret that could be guessed."""
    if not isinstance(secret, bytes) or len(secret) < _LEAST_SECRET:
        found = f"{len(secret)} bytes" if isinstance(secret, bytes) else type(secret)
        raise ValueError(
            f"PairGossip: secret must be at least {_LEAST_SECRET} random bytes, got "
            f"{found}. `python -c 'import secrets; print(secrets.token_hex(32))'` "
            "makes one; give every worker the same."
        )


def endpoint(address: str) -> str:
    """Check an address, and write it as ZeroMQ does.

    Args:
        address: ``host:port``; a name is looked up here.

    Raises:
        ValueError: if it is no address, or one that the world can reach: only loopback
            and private addresses are listened on and connected to.

    Example:
        >>> endpoint("127.0.0.1:5555")
        'tcp://127.0.0.1:5555'
        >>> endpoint("8.8.8.8:5555")
        Traceback (most recent call last):
        ...
        ValueError: PairGossip: only loopback and private addresses are used, and \
8.8.8.8:5555 is at 8.8.8.8. Give the worker's address in the cluster's own network.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
        if not host or not port or parts.path or parts.username is not None:
            raise ValueError("host:port is wanted")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
        ip = ipaddress.ip_address(found)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"PairGossip: no address: {address!r} ({error}). Write it as host:port, "
            "such as 10.0.0.3:5555."
        ) from None
    is_own = ip.is_loopback or ip.is_private
    if not is_own or ip.is_unspecified or ip.is_multicast:
        raise ValueError(
            f"PairGossip: only loopback and private addresses are used, and {address} "
            f"is at {ip}. Give the worker's address in the cluster's own network."
        )
    return f"tcp://[{ip}]:{port}" if ip.version == 6 else f"tcp://{ip}:{port}"


class _Only:
    """Admits clients that hold one public key."""

    def __init__(self, public: bytes):
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class Server:
    """The socket that a worker answers on, with who is admitted.

    Args:
        address: ``host:port`` to listen on.
        secret: shared by all workers.
        largest: bytes of the largest message; a connection on which a larger one
            arrives is closed before it is read.
        most: connections of peers at a time.

    Raises:
        ValueError: if the secret is short, or the address is none to listen on.
        OSError: if it is taken.
    """

    def __init__(self, address: str, secret: bytes, largest: int, most: int = 16):
        zmq = require_zmq()
        from zmq.auth.thread import ThreadAuthenticator

        require_secret(secret)
        listener = _listener(endpoint(address))
        self.context = zmq.Context()
        self._public, self._private = _keys(secret)
        self._largest = largest
        self._authenticator = ThreadAuthenticator(self.context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _Only(self._public))
        self.socket = _make(zmq, self.context, zmq.ROUTER, largest)
        self.socket.curve_server = True
        self.socket.curve_publickey = self._public
        self.socket.curve_secretkey = self._private
        # Nobody but this user can open what is in the folder.
        self._folder, self._lock = _own_folder()
        inner = os.path.join(self._folder, "pairs")
        self.socket.handshake_ivl = round(1000 * PROOF_S)
        self.socket.bind(f"ipc://{inner}")
        self.door = Door(listener, inner, most)

    def connect(self, address: str) -> Any:
        """Make a fresh socket that asks a peer; messages queue for live peers only."""
        zmq = require_zmq()
        client = _make(zmq, self.context, zmq.DEALER, self._largest)
        client.immediate = True
        client.reconnect_ivl = 100
        client.curve_serverkey = self._public
        client.curve_publickey = self._public
        client.curve_secretkey = self._private
        client.connect(endpoint(address))
        return client

    def close(self) -> None:
        """Close every socket; what could not be sent in 0.2 s is dropped."""
        self._authenticator.stop()
        self.context.destroy(linger=200)
        self.door.close(linger_s=0.2)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()


def _own_folder() -> tuple[str, IO[str]]:
    """Make a folder that is locked as long as this process lives.

    Those that killed processes have left are removed; one that is a minute old and not
    locked has nobody.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):  # another user's, or in use
            if left.stat().st_mtime < time.time() - 60:
                with open(left / "lock", "r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
    folder = tempfile.mkdtemp(prefix=_FOLDER)
    lock = open(os.path.join(folder, "lock"), "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _listener(where: str) -> socket.socket:
    """Bind a socket to an address that :func:`endpoint` wrote."""
    parts = urlsplit(where)
    family = socket.AF_INET6 if where.startswith("tcp://[") else socket.AF_INET
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((parts.hostname, parts.port))
    except OSError as error:
        made.close()
        raise OSError(
            f"PairGossip: cannot listen on {where}: {error.strerror}."
        ) from error
    return made


def _make(zmq: Any, context: Any, kind: int, largest: int) -> Any:
    made = context.socket(kind)
    made.linger = 0
    made.ipv6 = True
    made.maxmsgsize = largest + _ENVELOPE
    made.rcvhwm = made.sndhwm = 16  # messages that wait in memory, for each peer
    return made


def _keys(secret: bytes) -> tuple[bytes, bytes]:
    """Derive the pair of keys that all workers share: public, private."""
    zmq = require_zmq()
    from zmq.utils import z85

    digest = hashlib.blake2b(secret, digest_size=32, person=b"bagua_jax pairs")
    private = z85.encode(digest.digest())
    return zmq.curve_public(private), private
