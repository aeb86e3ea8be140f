"""The leader's own calls to ranks: is anybody there, whatever the agents say?"""

from __future__ import annotations

import asyncio
from typing import Protocol

import grpc

from raddle.core.events import NodeProbed, RankProbed
from raddle.core.instructions import ProbeNode, ProbeRank
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import RANK_NAME, TlsFiles
from raddle.v1 import engine_pb2, engine_pb2_grpc

PROBE_TIMEOUT_S = 0.5


class RankProber(Protocol):
    """Whatever can ask a rank for a sign of life."""

    async def node(self, probe: ProbeNode) -> NodeProbed: ...

    async def rank(self, probe: ProbeRank) -> RankProbed: ...


class Prober:
    """Asks ranks for a sign of life on fresh connections, since an old one may be the trouble."""

    def __init__(self, tls: TlsFiles | None) -> None:
        self._tls = tls

    async def node(self, probe: ProbeNode) -> NodeProbed:
        """Does any rank of the node answer?"""
        answers = await asyncio.gather(*(self._answers(a, i) for a, i in probe.ranks))
        return NodeProbed(probe.node, any(answers))

    async def rank(self, probe: ProbeRank) -> RankProbed:
        answered = await self._answers(probe.engine_address, probe.incarnation)
        return RankProbed(probe.job_uid, probe.incarnation, answered)

    async def _answers(self, address: str, incarnation: str) -> bool:
        if not address:
            return False
        channel = make_channel(address, identity="scheduler", tls=self._tls, server_name=RANK_NAME)
        try:
            stub = engine_pb2_grpc.EngineStub(channel)
            answer = await stub.Ping(engine_pb2.PingRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        finally:
            await channel.close()
        return bool(answer.incarnation == incarnation)
