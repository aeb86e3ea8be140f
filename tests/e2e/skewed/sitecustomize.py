"""Gives each process that finds this folder in PYTHONPATH a clock of its own.

The clocks of a real machine's hosts may be minutes apart. Up to ten minutes either way, by the
command line: so two processes differ, and a process that is started again does not.
"""

import importlib
import sys
import time
import types
import zlib

_SKEW_MAX_S = 600
_true_time = time.time
_skew_s = zlib.crc32("\0".join(sys.orig_argv).encode()) % (2 * _SKEW_MAX_S) - _SKEW_MAX_S


def _skewed_time() -> float:
    return _true_time() + _skew_s


# gRPC's core counts deadlines on the host's real clock, which no other host sees: its Python half
# must read the same one, as it would on a host that is wrong as a whole.
for _name in ("grpc.aio._utils", "grpc._cython.cygrpc"):
    vars(importlib.import_module(_name))["time"] = types.SimpleNamespace(time=_true_time)
time.time = _skewed_time
