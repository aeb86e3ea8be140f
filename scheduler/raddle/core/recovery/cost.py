"""What a recovery costs, in seconds of the instance's work.

The cost of an option is the pause that it causes plus the demand that the remaining capacity
cannot serve until the loss is made good, so that a short pause that leaves the instance smaller
is weighed against a longer one that leaves it whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from raddle.core.cluster import Cluster
from raddle.core.experts.sources import Bandwidths
from raddle.model.llm import ModelShape

# Fence, new members and maps: the control plane's own target for one die fault.
CONTROL_S = 0.05
# A new engine process until it answers. Ray restarts an actor in 1.5 to 2.0 s; engines with
# graphs and communicators take longer, and say so by their own figures later.
PROCESS_START_S = 1.75
# A lost die is replaced or repaired within this time: what smaller capacity costs is counted
# until then. MTTR of 13 minutes with monitoring (UB-Mesh, table 6).
CAPACITY_HORIZON_S = 13 * 60.0
# Reading weights by rank from the checkpoint store, when the machine does not say.
_DEFAULT_BYTES_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Rates:
    """Sizes and bandwidths that turn moves into seconds."""

    expert_bytes: int
    other_bytes: int
    peer_bytes_per_s: int
    disk_bytes_per_s: int

    @staticmethod
    def of(shape: ModelShape, dtype: str, cluster: Cluster) -> Rates:
        machines = list(cluster.supernodes.values())
        peer = min((m.die_to_die_bytes_per_s for m in machines), default=_DEFAULT_BYTES_PER_S)
        disk = min((m.die_to_host_bytes_per_s for m in machines), default=_DEFAULT_BYTES_PER_S)
        return Rates(shape.expert_bytes(dtype), shape.other_bytes(dtype), peer, disk)

    def bandwidths(self) -> Bandwidths:
        """How experts' weights travel; no pool of weights is kept in the hosts' memory."""
        peer, disk = float(self.peer_bytes_per_s), float(self.disk_bytes_per_s)
        return Bandwidths(self.expert_bytes, peer, 0.0, disk)

    def start_s(self) -> float:
        """Seconds until a new process has the weights that are no experts."""
        return PROCESS_START_S + self.other_bytes / self.disk_bytes_per_s


def cost_s(pause_s: float, capacity_left: float, demand: float) -> float:
    """Seconds of the instance's work that are lost.

    All of it during the pause; afterwards, until the horizon, only the part of the demand that
    the remaining capacity cannot serve (both as shares of the whole instance).
    """
    return pause_s + max(0.0, demand - capacity_left) * CAPACITY_HORIZON_S
