"""The two jobs of the demonstration: the large one on simulated engines, the small one for real."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from raddle.v1 import job_pb2
from raddle.wire.parse import job_message

LARGE = "deepseek-r1.yaml"
SMALL = "small.yaml"
SMALL_MODEL = "raddle-demo"
# The nodes that run real ranks: after one is lost the others still hold every expert.
REAL_NODES = 4


def job(name: str) -> job_pb2.JobSpec:
    """The spec of one of the two jobs."""
    text = (resources.files(__package__ or __name__) / name).read_text()
    return job_message(text, Path())
