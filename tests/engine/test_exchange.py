"""Expert traffic over real sockets: what an epoch's end breaks off, and what it leaves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from raddle.agent.engine.reference.exchange import (
    ExchangeClient,
    ExchangeServer,
    PeerLost,
    pack_rows,
)
from raddle.model.types import Member
from tests.engine.small import JOB, make_member

WIDTH = 4
DEADLINE_S = 20.0


class Peer:
    """Answers each row with the layer's number; can be made to hang or to refuse."""

    def __init__(self, rank: int) -> None:
        #: The thread that served each request: one a connection.
        self.connections: list[threading.Thread] = []
        self.asked = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.refuses = False
        self.server = ExchangeServer(JOB, self._serve, lambda *_: None)
        self.member: Member = make_member(rank, data=self.server.address)

    def _serve(self, _epoch: int, layer: int, body: bytes) -> bytes | None:
        self.connections.append(threading.current_thread())
        self.asked.set()
        assert self.goes_on.wait(DEADLINE_S)
        if self.refuses:
            return None
        count = int(np.frombuffer(body, np.int32, 1)[0])
        return np.full((count, WIDTH), layer, np.float32).tobytes()


@contextlib.contextmanager
def talking(count: int) -> Iterator[tuple[ExchangeClient, list[Peer]]]:
    peers = [Peer(rank) for rank in range(count)]
    client = ExchangeClient(JOB, DEADLINE_S)
    try:
        yield client, peers
    finally:
        client.close()
        for peer in peers:
            peer.goes_on.set()
            peer.server.close()


def ask(client: ExchangeClient, peers: list[Peer], epoch: int, layer: int) -> list[float]:
    rows = pack_rows([0], np.ones((1, WIDTH), np.float32), np.ones((1, 1), np.float32))
    bodies = dict.fromkeys(range(len(peers)), rows)
    found = client.dispatch(epoch, layer, bodies, dict(enumerate(p.member for p in peers)))
    return [float(found[rank][0, 0]) for rank in sorted(found)]


def test_connections_live_on_in_the_next_epoch() -> None:
    """An epoch that ends between two steps breaks no connection."""
    with talking(2) as (client, peers):
        assert ask(client, peers, 1, 5) == [5, 5]
        client.abort(2)
        client.keep_only([peer.member for peer in peers])
        assert ask(client, peers, 2, 6) == [6, 6]
        assert [len(set(peer.connections)) for peer in peers] == [1, 1]


def test_a_step_that_waits_for_a_hung_peer_ends_with_its_epoch() -> None:
    """Only the connection on which an answer is missing breaks; an idle one is used again."""
    with talking(2) as (client, peers):
        ask(client, peers, 1, 1)
        peers[1].asked.clear()
        peers[1].goes_on.clear()
        lost: list[PeerLost] = []

        def step() -> None:
            with pytest.raises(PeerLost) as caught:
                ask(client, peers[1:], 1, 2)
            lost.append(caught.value)

        thread = threading.Thread(target=step)
        thread.start()
        assert peers[1].asked.wait(DEADLINE_S)
        client.abort(2)
        thread.join(DEADLINE_S / 2)
        assert [(one.peer, one.reason) for one in lost] == [(peers[1].member, "CONNECTION_BROKEN")]
        assert ask(client, peers[:1], 2, 3) == [3]
        assert len(set(peers[0].connections)) == 1


def test_nothing_of_an_epoch_that_is_over_leaves() -> None:
    """A step that goes on after its epoch's end asks nobody any more."""
    with talking(1) as (client, peers):
        ask(client, peers, 1, 1)
        client.abort(2)
        with pytest.raises(PeerLost):
            ask(client, peers, 1, 2)
        assert len(peers[0].connections) == 1


def test_a_late_answer_is_never_taken_for_a_later_one() -> None:
    """One peer refuses a step; what the other still sends for it goes nowhere."""
    with talking(2) as (client, peers):
        ask(client, peers, 1, 1)
        peers[0].refuses = True
        peers[1].goes_on.clear()
        with pytest.raises(PeerLost, match="REFUSED"):
            ask(client, peers, 1, 2)
        peers[0].refuses = False
        peers[1].goes_on.set()
        assert ask(client, peers, 1, 3) == [3, 3]


def test_peers_that_left_are_let_go() -> None:
    """A connection to a rank that is no member any more is closed, and made anew if it returns."""
    with talking(2) as (client, peers):
        ask(client, peers, 1, 1)
        client.keep_only([peers[0].member])
        ask(client, peers, 2, 2)
        assert [len(set(peer.connections)) for peer in peers] == [1, 2]
