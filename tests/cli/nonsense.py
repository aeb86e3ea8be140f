"""Files and calls that make no sense, and the words that must lead a reader to the error."""

from __future__ import annotations

from pathlib import Path

from tests.cli.program import job_text
from tests.e2e.served import SMALL_MACHINE

GOOD = job_text("bad")
BAD_FILES: dict[str, dict[str, tuple[str | bytes, str]]] = {
    "no job": {
        "nothing": ("", "one mapping"),
        "a list": ("- a\n", "one mapping"),
        "no YAML": ("a: [b", "line 1"),
        "a NUL": (b"name: x\0y\n", "no YAML"),
        "brackets without end": ("a: " + "[" * 5000, "no YAML"),
        "a custom resource": ("apiVersion: raddle.dev/v1alpha1\n" + GOOD, "kubectl apply"),
        "a call": ('name: !!python/object/apply:os.system ["id"]', "no YAML"),
    },
    "fields": {
        "an unknown one": (GOOD + "colour: red\n", "colour"),
        "an unknown one of a role": (GOOD.replace("ranks:", "rnks:"), "rnks"),
        "an alias to itself": ("name: &a [*a]\n", "name"),
        "an unknown driver": (GOOD.replace("simulated", "magic"), "reference, simulated"),
        "an unknown kind": (GOOD.replace("kind: decode", "kind: encode"), "prefill, decode"),
        "one role twice": (GOOD + GOOD.splitlines()[3] + "\n", "used twice"),
        "a model of no shape": (GOOD.replace("config: raddle-demo", "config: {}"), "model.config"),
        "a NUL in a model's path": (GOOD.replace("raddle-demo", '"a\\0b"'), "model.config"),
        "a model with a date": (GOOD.replace("raddle-demo", "{when: 2020-01-01}"), "no JSON"),
    },
    "types": {
        "a word for a number": (GOOD.replace("ranks: 4", "ranks: four"), "ranks"),
        "a part of a number": (GOOD.replace("ranks: 4", "ranks: 1.5"), "roles[0].ranks"),
        "a text for a mapping": (GOOD.replace("{config: raddle-demo,", "deepseek-r1 #"), "mapping"),
        "a text for a role": ("name: x\nroles: [decode]\n", "roles[0] must be a mapping"),
        "a text for an engine": (GOOD.replace("{driver: simulated}", "x"), "roles[0].engine"),
        "a number for a list": ("name: x\nroles: 7\n", "roles"),
        "a number for a text": (GOOD.replace("name: bad", "name: 123"), "name"),
        "a word for a time": (GOOD + "recovery: {max_pause: soon}\n", "max_pause"),
    },
    "sizes": {
        "negative ranks": (GOOD.replace("ranks: 4", "ranks: -4"), "roles[0].ranks"),
        "no ranks": (GOOD.replace("ranks: 4", "ranks: 0"), "roles[0].ranks"),
        "ranks beyond numbers": (GOOD.replace("ranks: 4", "ranks: 99999999999"), "ranks"),
        "negative slots": (GOOD.replace("slots_per_rank: 16", "slots_per_rank: -1"), "slots"),
        "a long name": (GOOD.replace("name: bad", f"name: {'a' * 600}"), "512"),
    },
    "names": {
        "a path": (GOOD.replace("name: bad", "name: ../x"), "letters, digits and dashes"),
        "an escape": (GOOD.replace("name: bad", 'name: "a\\e[2J"'), "control"),
        "a role's path": (GOOD.replace("name: decode", "name: ../r"), "roles[0].name"),
        "a namespace's path": (GOOD + "namespace: a/b\n", "namespace"),
        "a queue's escape": (GOOD + 'queue: "q\\e"\n', "queue"),
        "half a character": ('name: "\\ud800"\n', "name"),
    },
}


MACHINE = Path(SMALL_MACHINE).read_text()
BAD_MACHINES: dict[str, tuple[str, str]] = {
    "negative": (MACHINE.replace("\nnodes: 4", "\nnodes: -4"), "supernode.nodes"),
    "too many": (MACHINE.replace("\nnodes: 4", "\nnodes: 5"), "compute_racks"),
    "unknown": (MACHINE + "colour: red\n", "colour"),
    "path": (MACHINE.replace("name: sn0", "name: a/b"), "supernode.name"),
}
BAD_CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "no YAML": ("contexts: [", "line 2"),
    "a wrong type": ("contexts: {a: {server: [1]}}", "server"),
    "no text": (b"\xff\xfe\x00", "config.yaml"),
    "half of TLS": ("contexts: {a: {ca: ca.pem}}", "three files"),
}
Calls = tuple[tuple[tuple[str, ...], str], ...]
DIE = "sn0/n00/npu0/die0"
NOT_THERE: Calls = (
    (("status", "nobody"), "`raddle status`"),
    (("describe", "j-nobody"), "`raddle status`"),
    (("scale", "nobody", "decode", "--ranks", "2"), "`raddle status`"),
    (("cordon", "sn0/n99"), "`raddle dies`"),
    (("inject", "sn0/n99/npu0/die0"), "`raddle dies`"),
    (("lost", "../x"), "`raddle nodes`"),
    (("explain", "incident/i-9"), "`raddle incidents`"),
    (("incidents", "i-000077"), "i-000077"),
    (("drain", "m-nobody", "--cancel"), "m-nobody"),
    (("--context", "nobody", "status"), "known: none"),
    (("submit", "nobody.yaml"), "nobody.yaml"),
    (("supernode", "nobody"), "cloudmatrix384"),
    (("dies", "sn0/n99"), "`raddle nodes`"),
)
MISUSES: Calls = (
    (("bogus",), "bogus"),
    (("submit",), "file"),
    (("status", "--colour"), "--colour"),
    (("--output", "xml", "status"), "table, json"),
    (("status", "-o", "xml"), "table, json"),
    (("--timeout", "soon", "status"), "--timeout"),
    (("scale", "a", "decode", "--ranks", "many"), "--ranks"),
    (("inject", DIE, "--level", "MAYBE"), "SEPARATE_NPU"),
    (("config", "set-context", "a"), "--server"),
    (("drain", "sn0/n01", "--dry-run", "--deadline", "nan"), "seconds"),
    (("drain", "sn0/n01", "--dry-run", "--deadline", "-5"), "seconds"),
    (("--timeout", "-1", "status"), "seconds"),
    (("up", "--port", "99999"), "65535"),
    (("up", "--port", "-1"), "--port"),
    (("up", "--schedulers", "0"), "--schedulers"),
    (("up", "--real-nodes", "-1"), "--real-nodes"),
    (("demo", "--requests", "0"), "--requests"),
    (("demo", "-o", "xml"), "table, json"),
    (("update", "kept", "--priority", "99999999999"), "--priority"),
)
#: There is a job `kept`, and files `j.yaml` and `k.yaml` with jobs of these names.
NONSENSE: Calls = (
    (("cordon", "../x"), "sn0/n07"),
    (("cordon", "sn0/n01\x1b[2J"), "subject"),
    (("status", "a\x1b[2J"), "name"),
    (("cordon", "sn0/n01", "-m", "a\x1b[2J"), "message"),
    (("cordon", "sn0/n01", "-m", "a" * 600), "512"),
    (("drain", "sn0/../n01"), "sn0/n07"),
    (("inject", DIE, "--code", "a\x07"), "code"),
    (("explain", "kept"), "job/<uid>"),
    (("scale", "kept", "decode"), "above 0"),
    (("scale", "kept", "decode", "--ranks", "2", "--instances", "2"), "either"),
    (("update", "kept", "--queue", "a\x1b"), "queue"),
    (("events", "--last", "-1"), "1000"),
    (("submit", "j.yaml", "--idempotency-key", "\x1b"), "key"),
    (("-n", "a/b", "submit", "k.yaml"), "namespace"),
    (("-n", "a/b", "status"), "namespace"),
)


def _model(config: str) -> str:
    return GOOD.replace("config: raddle-demo", f"config: {config}")


#: Calls that ought to be refused and are not, or end with a traceback.
ACCEPTED_CALLS: dict[str, tuple[str, ...]] = {
    "an explanation of no node": ("explain", "node/sn0/n77"),
    "an explanation of no die": ("explain", "die/sn0/n01/npu3/die9"),
    "an explanation of no position": ("explain", "die/../x"),
    "a context without name and server": ("config", "set-context", "", "--server", ""),
}
ACCEPTED_FILES: dict[str, str] = {
    "one key twice": GOOD + "name: other\n",
}
ACCEPTED_CONFIGS: dict[str, str] = {
    "an unknown field": "colour: red\n",
    "a current context that is not there": "current: gone\n",
}
