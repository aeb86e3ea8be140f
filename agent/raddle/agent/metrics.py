"""What the agent counts. Names are API."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge

from raddle.agent.nodes_file import NodesFile
from raddle.agent.served import ServedNodes


class Metrics:
    """All metrics of one agent process, in a registry of their own; read when asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._nodes = Gauge(
            "raddle_agent_nodes", "Nodes that this process serves.", registry=self.registry
        )
        self._silent = Gauge(
            "raddle_agent_nodes_silent",
            "Nodes of this process whose health is not in the store now.",
            registry=self.registry,
        )
        self._usable = Gauge(
            "raddle_agent_nodes_file_usable",
            "1 while the file that names the nodes is there and right, or none is needed.",
            registry=self.registry,
        )

    def follow(self, served: ServedNodes, file: NodesFile | None) -> None:
        self._nodes.set_function(lambda: len(served.nodes))
        self._silent.set_function(lambda: len(served.silent))
        self._usable.set_function(lambda: 0 if file is not None and file.trouble else 1)
