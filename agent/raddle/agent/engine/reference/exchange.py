"""Expert traffic between ranks: dispatch rows to the ranks that host experts, combine answers.

One TCP connection from each rank to each peer, one request at a time on it. A frame carries the
job, the epoch and the sender; frames of another job or another epoch are refused. A broken
connection, a refusal or a missed deadline raises `PeerLost`: the step is over. With certificates
the connections are TLS, only ranks are heard, and only ranks are asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from raddle.agent.engine.reference.weights import F32, FloatArray
from raddle.model.types import Member, RankKey
from raddle.telemetry.addresses import host_port, split_address
from raddle.telemetry.tls import RANK_NAME, TlsFiles, is_rank

_HEADER = struct.Struct("<4sB3x16sqiiII")
_MAGIC = b"RDXP"
_DISPATCH, _COMBINE, _REFUSED, _WEIGHTS = 1, 2, 3, 4
_FRAME_BYTES_MAX = 64 * 1024 * 1024
_HANDSHAKE_TIMEOUT_S = 5.0
log = structlog.get_logger()


class PeerLost(Exception):  # noqa: N818 - an event in a step's life
    """A peer does not take part in this step any more."""

    def __init__(self, peer: Member, reason: str) -> None:
        super().__init__(f"{peer.rank.role}/{peer.rank.instance}/{peer.rank.rank}: {reason}")
        self.peer = peer
        #: CONNECTION_BROKEN, STEP_DEADLINE or REFUSED.
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of the expert traffic."""

    kind: int
    job: bytes
    epoch: int
    layer: int
    expert: int
    body: bytes


def job_tag(job_uid: str) -> bytes:
    return hashlib.blake2b(job_uid.encode(), digest_size=16).digest()


def _common_name(connection: ssl.SSLSocket) -> str:
    subject: Any = (connection.getpeercert() or {}).get("subject", ())
    return next((v for part in subject for k, v in part if k == "commonName"), "")


def _peer(connection: socket.socket) -> str:
    """Where the other side is; empty if it has gone again."""
    try:
        host, port, *_ = connection.getpeername()
    except OSError:
        return ""
    return host_port(host, port)


@dataclass(slots=True)
class _Caller:
    """Who is at the other end: an address, and a name once a certificate has proved it."""

    address: str
    identity: str = ""

    def refused(self, why: str, **what: int) -> None:
        log.warning(
            "refused",
            identity=self.identity,
            address=self.address,
            call="expert traffic",
            why=why,
            **what,
        )


def _send(connection: socket.socket, frame: Frame) -> None:
    header = _HEADER.pack(
        _MAGIC, frame.kind, frame.job, frame.epoch, frame.layer, frame.expert, len(frame.body), 0
    )
    connection.sendall(header + frame.body)


def _receive(connection: socket.socket) -> Frame | None:
    """The next frame; None at the end of the stream."""
    header = _read(connection, _HEADER.size)
    if header is None:
        return None
    magic, kind, job, epoch, layer, expert, length, _ = _HEADER.unpack(header)
    if magic != _MAGIC or length > _FRAME_BYTES_MAX:
        raise ConnectionError("not a frame of expert traffic")
    body = _read(connection, length)
    if body is None:
        return None
    return Frame(kind, job, epoch, layer, expert, body)


def _read(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        data = connection.recv(min(1 << 18, size - len(parts)))
        if not data:
            return None
        parts += data
    return bytes(parts)


def pack_rows(slots: list[int], quantised: FloatArray, scale: FloatArray) -> bytes:
    """Rows for the given slots: count, slot numbers, int8 rows, scales."""
    rows = np.array([len(slots), quantised.shape[1]], dtype=np.int32)
    numbers = np.array(slots, dtype=np.int32)
    parts = [rows.tobytes(), numbers.tobytes(), quantised.astype(np.int8).tobytes()]
    return b"".join([*parts, scale.astype(F32).tobytes()])


def unpack_rows(body: bytes) -> tuple[list[int], FloatArray, FloatArray]:
    count, width = (int(v) for v in np.frombuffer(body, np.int32, 2))
    slots = np.frombuffer(body, np.int32, count, 8).tolist()
    at = 8 + 4 * count
    quantised = np.frombuffer(body, np.int8, count * width, at).reshape(count, width)
    scale = np.frombuffer(body, F32, count, at + count * width).reshape(count, 1)
    return slots, quantised.astype(F32), scale


Serve = Callable[[int, int, bytes], bytes | None]
Weights = Callable[[int, int], bytes | None]


class ExchangeServer:
    """Answers peers: `serve(epoch, layer, body)` gives the combined rows, None refuses."""

    def __init__(
        self,
        job_uid: str,
        serve: Serve,
        weights: Weights,
        *,
        host: str = "127.0.0.1",
        tls: TlsFiles | None = None,
    ) -> None:
        self._job = job_tag(job_uid)
        self._serve = serve
        self._weights = weights
        self._tls = tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=512)
        self.address = host_port(host, self._socket.getsockname()[1])
        self._closing = False
        threading.Thread(target=self._accept, name="exchange", daemon=True).start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _secured(self, connection: socket.socket, caller: _Caller) -> socket.socket:
        """The connection, over TLS where there are certificates; the caller's name is known then.

        Raises:
            OSError: no certificate of our CA, or not a rank's.
        """
        if self._tls is None:
            return connection
        connection.settimeout(_HANDSHAKE_TIMEOUT_S)
        context = self._tls.socket_context(server=True)
        secured = context.wrap_socket(connection, server_side=True)
        secured.settimeout(None)
        caller.identity = _common_name(secured)
        if not is_rank(caller.identity):
            secured.close()
            raise ConnectionError(f"{caller.identity} is no rank's identity")
        return secured

    def _answer(self, plain: socket.socket) -> None:
        caller = _Caller(_peer(plain))
        try:
            connection = self._secured(plain, caller)
        except OSError as error:
            caller.refused(str(error))
            plain.close()
            return
        with connection, contextlib.suppress(OSError):
            while True:
                frame = _receive(connection)
                if frame is None:
                    return
                answer = self._answer_to(frame)
                if answer is None:
                    why = "not here" if frame.job == self._job else "frame of another job"
                    caller.refused(why, kind=frame.kind, epoch=frame.epoch)
                kind = _REFUSED if answer is None else _COMBINE
                _send(connection, Frame(kind, self._job, frame.epoch, 0, 0, answer or b""))

    def _answer_to(self, frame: Frame) -> bytes | None:
        """What a peer of this job asked for; None refuses."""
        if frame.job == self._job and frame.kind == _DISPATCH:
            return self._serve(frame.epoch, frame.layer, frame.body)
        if frame.job == self._job and frame.kind == _WEIGHTS:
            return self._weights(frame.layer, frame.expert)
        return None

    def close(self) -> None:
        self._closing = True
        self._socket.close()


class ExchangeClient:
    """This rank's connections to its peers, kept from epoch to epoch.

    One thread asks; `abort`, `keep_only` and `close` may come from another.
    """

    def __init__(self, job_uid: str, deadline_s: float, tls: TlsFiles | None = None) -> None:
        self._job = job_tag(job_uid)
        self._deadline_s = deadline_s
        self._tls = tls
        self._connections: dict[str, socket.socket] = {}
        #: Peers that were asked and have not answered yet.
        self._asked: set[str] = set()
        #: Nothing of an older epoch leaves any more.
        self._epoch_min = 0
        self._lock = threading.Lock()

    def dispatch(
        self, epoch: int, layer: int, bodies: Mapping[int, bytes], peers: Mapping[int, Member]
    ) -> dict[int, FloatArray]:
        """Send each peer rank its rows, then gather all answers [rows, hidden].

        Raises:
            PeerLost: a peer broke off, refused or missed the deadline, or the epoch is over.
        """
        try:
            for rank, body in bodies.items():
                self._send(peers[rank], Frame(_DISPATCH, self._job, epoch, layer, 0, body))
            found = {rank: self._receive(peers[rank], epoch) for rank in bodies}
        except PeerLost:
            # The other peers' answers are on their way: nobody may take them for later ones.
            self._break_asked()
            raise
        answers = {}
        for rank, body in bodies.items():
            count = int(np.frombuffer(body, np.int32, 1)[0])
            answers[rank] = np.frombuffer(found[rank], F32).reshape(count, -1)
        return answers

    def weights(self, peer: Member, layer: int, expert: int) -> bytes:
        """An expert's weights from a peer's memory, at whatever epoch it is.

        Raises:
            PeerLost: also when the peer does not hold it.
        """
        self._send(peer, Frame(_WEIGHTS, self._job, 0, layer, expert, b""))
        return self._receive(peer, 0)

    def _send(self, peer: Member, frame: Frame) -> None:
        try:
            _send(self._connection(peer, frame.epoch), frame)
        except OSError as error:
            raise self._lost(peer, error) from error

    def _receive(self, peer: Member, epoch: int) -> bytes:
        with self._lock:
            connection = self._connections.get(peer.data_address)
        if connection is None:
            # Broken off since the request went out: no other connection will ever answer it.
            raise self._lost(peer, ConnectionError())
        try:
            answer = _receive(connection)
        except OSError as error:
            raise self._lost(peer, error) from error
        if answer is None:
            raise self._lost(peer, ConnectionError())
        if answer.kind == _REFUSED or answer.epoch != epoch:
            self._drop(peer)
            raise PeerLost(peer, "REFUSED")
        with self._lock:
            self._asked.discard(peer.data_address)
        return answer.body

    def _lost(self, peer: Member, error: OSError) -> PeerLost:
        self._drop(peer)
        late = isinstance(error, TimeoutError)
        return PeerLost(peer, "STEP_DEADLINE" if late else "CONNECTION_BROKEN")

    def _connection(self, peer: Member, epoch: int) -> socket.socket:
        """The connection on which a request of this epoch goes out now.

        Raises:
            OSError: none to be had.
            ConnectionAbortedError: the epoch is over.
        """
        address = peer.data_address
        with self._lock:
            found = self._connections.get(address)
        made = self._connect(address) if found is None else found
        with self._lock:
            self._connections[address] = made
            self._asked.add(address)
            if epoch and epoch < self._epoch_min:
                raise ConnectionAbortedError
        return made

    def _connect(self, address: str) -> socket.socket:
        made = socket.create_connection(split_address(address), self._deadline_s)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.settimeout(self._deadline_s)
        if self._tls is None:
            return made
        context = self._tls.socket_context(server=False)
        return context.wrap_socket(made, server_hostname=RANK_NAME)

    def _drop(self, peer: Member) -> None:
        self._break({peer.data_address})

    def _break_asked(self) -> None:
        with self._lock:
            asked = set(self._asked)
        self._break(asked)

    def _break(self, addresses: set[str]) -> None:
        with self._lock:
            self._asked -= addresses
            known = addresses & set(self._connections)
            broken = [self._connections.pop(address) for address in known]
        for connection in broken:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def abort(self, epoch: int) -> None:
        """End what is under way for older epochs: a step that waits for a peer ends at once.

        Connections that nobody waits on stay: most peers are there in the next epoch too.
        """
        with self._lock:
            self._epoch_min = max(epoch, self._epoch_min)
        self._break_asked()

    def keep_only(self, peers: Collection[Member]) -> None:
        """Let go of all others."""
        with self._lock:
            others = set(self._connections) - {peer.data_address for peer in peers}
        self._break(others)

    def close(self) -> None:
        self.keep_only(())


def rank_members(members: tuple[Member, ...], key: RankKey) -> dict[int, Member]:
    """The members of a rank's own instance, by rank."""
    return {
        m.rank.rank: m
        for m in members
        if (m.rank.role, m.rank.instance) == (key.role, key.instance)
    }
