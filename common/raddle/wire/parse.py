"""Strict parsing of what people write: job and supernode files, requests of the API.

In go YAML or JSON text or request messages; out come model values with defaults filled in, or one
`PermanentError` that names the path. What needs the state of the cluster is checked in the core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import duration_pb2, json_format
from google.protobuf.message import Message

from raddle.model.errors import PermanentError, Reason
from raddle.model.job import JobSpec
from raddle.model.topology import SuperNode
from raddle.model.types import DURATION_S_MAX
from raddle.v1 import job_pb2, topology_pb2
from raddle.wire.codec import CodecError, from_message

FILE_BYTES_MAX = 1_000_000
TEXT_CHARACTERS_MAX = 512
_DEFAULT_KV_BLOCK_TOKENS = 128
_NANOS = 1_000_000_000
#: Paths whose texts are bounded by what parses them.
_LONG_TEXTS = ("model.config", "spec.model.config")


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, which takes a key twice, made to refuse that."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{name!r} is there twice in the mapping at line {line}")
        return dict(super().construct_mapping(node, deep))


def read_document(text: str) -> dict[str, Any]:
    """One YAML or JSON mapping.

    Raises:
        PermanentError: LIMIT_EXCEEDED or INVALID_ARGUMENT with the line.
    """
    if len(text.encode()) > FILE_BYTES_MAX:
        raise PermanentError(Reason.LIMIT_EXCEEDED, f"the file is over {FILE_BYTES_MAX} bytes.")
    try:
        document = yaml.load(text, Loader=_UniqueKeys)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = " ".join(str(error).split())[:300]
        raise PermanentError(Reason.INVALID_ARGUMENT, f"the file is no YAML: {first}") from error
    if not isinstance(document, dict):
        raise PermanentError(Reason.INVALID_ARGUMENT, "the file must hold one mapping of fields.")
    return document


def job_message(text: str, folder: Path) -> job_pb2.JobSpec:
    """The `JobSpec` message of a job file.

    `model.config` may be the config.json as a mapping, or a path to it relative to `folder`, or
    the name of a model that comes with the project.
    """
    document = read_document(text)
    if "apiVersion" in document:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            "job: this is a resource of Kubernetes: `kubectl apply -f` it where the operator runs, "
            "or write its name and what is under its spec as a job file.",
            field="apiVersion",
        )
    model = document.get("model")
    if isinstance(model, dict):
        model["config"] = _config_text(model.get("config"), folder)
    _refuse_zeros(document)
    message = job_pb2.JobSpec()
    set_fields(document, message, "job")
    return message


def _refuse_zeros(document: dict[str, Any]) -> None:
    """A message cannot tell a written 0 from nothing, which means the default."""
    model, roles = document.get("model"), document.get("roles")
    parts = [("model", model, ("kv_block_tokens", "kvBlockTokens"))]
    for index, role in enumerate(roles if isinstance(roles, list) else []):
        parts.append((f"roles[{index}]", role, ("instances", "tp")))
    for path, part, names in parts:
        written = part if isinstance(part, dict) else {}
        for name in names:
            if written.get(name) in (0, "0"):
                raise PermanentError(
                    Reason.INVALID_ARGUMENT,
                    f"job: {path}.{name} must be at least 1; leave it out for the default.",
                    field=f"{path}.{name}",
                )


def _config_text(config: Any, folder: Path) -> str:
    if isinstance(config, dict):
        try:
            return json.dumps(config, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"model.config is no JSON: {error}."
            ) from error
    if not isinstance(config, str):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            "model.config must be a mapping, a path, or the name of a built-in model.",
        )
    from raddle import models

    if config in models.names():
        return models.config_text(config)
    path = folder / config
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise PermanentError(Reason.LIMIT_EXCEEDED, f"{path} is over {FILE_BYTES_MAX} bytes.")
        return path.read_text()
    except ValueError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"model.config {config!r} is no text file: {error}."
        ) from error
    except OSError as error:
        names = ", ".join(models.names())
        raise PermanentError(
            Reason.NOT_FOUND,
            f"model.config {config!r} is neither a file ({error.strerror}) nor built in ({names}).",
        ) from error


def set_fields(document: Mapping[str, Any], message: Message, what: str) -> None:
    """Set the fields that a document gives; the others stay.

    Raises:
        PermanentError: UNKNOWN_FIELD or INVALID_ARGUMENT naming the path.
    """
    _require_mappings(document, message.DESCRIPTOR, "")
    try:
        json_format.ParseDict(dict(document), message)
    except (json_format.ParseError, TypeError) as error:
        text = " ".join(str(error).split())
        reason = Reason.UNKNOWN_FIELD if "no field named" in text else Reason.INVALID_ARGUMENT
        raise PermanentError(reason, f"{what}: {text[:400]}") from error


def _require_mappings(document: Mapping[str, Any], message: Any, prefix: str) -> None:
    """Refuse a text or a list where fields belong, which `ParseDict` would take for names.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the path.
    """
    for name, value in document.items():
        field = message.fields_by_name.get(str(name))
        inner = field.message_type if field is not None else None
        if field is None or inner is None or inner.full_name.startswith("google."):
            continue
        path = f"{prefix}{name}"
        if inner.GetOptions().map_entry:
            _require_mapping(path, value)
        elif not field.is_repeated:
            _require_mappings(_require_mapping(path, value), inner, f"{path}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                found = _require_mapping(f"{path}[{index}]", item)
                _require_mappings(found, inner, f"{path}[{index}].")
        else:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{path} must be a list, not {value!r:.80}.", field=path
            )


def _require_mapping(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{path} must be a mapping of fields, not {value!r:.80}.",
            field=path,
        )
    return value


def supernode(message: topology_pb2.SuperNode) -> SuperNode:
    """The supernode of a request.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the field.
    """
    return from_message(message, SuperNode)


def job_spec(message: job_pb2.JobSpec) -> JobSpec:
    """The spec of a request with defaults filled in and all texts bounded.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the field.
    """
    full = job_pb2.JobSpec()
    full.CopyFrom(message)
    _fill_defaults(full)
    return job_change(full)


def job_change(message: job_pb2.JobSpec) -> JobSpec:
    """The spec of an update, as it is: only what the request's mask names is read.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the field.
    """
    require_texts(message)
    duration_s("recovery.max_pause", message.recovery.max_pause)
    try:
        return from_message(message, JobSpec)
    except CodecError as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"spec: {error}.") from error


def duration_s(path: str, message: duration_pb2.Duration) -> float:
    """A time that somebody asks for, in seconds: not negative, and at most ten years.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the field.
    """
    seconds = message.seconds + message.nanos / _NANOS
    if not (0 <= message.nanos < _NANOS and 0 <= seconds <= DURATION_S_MAX):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{path} must be between 0 and {DURATION_S_MAX} seconds.",
            field=path,
        )
    return seconds


def require_texts(message: Message) -> None:
    """All texts of a request are short and printable, wherever they are.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the field.
    """
    for path, value in _texts(message, ""):
        if path not in _LONG_TEXTS:
            require_text(path, value)


def require_text(path: str, value: str) -> None:
    """Texts are short and printable: they end up in keys, logs and terminals.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    if len(value) > TEXT_CHARACTERS_MAX:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{path} is longer than {TEXT_CHARACTERS_MAX} characters.",
            field=path,
        )
    if value and not value.isprintable():
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"{path} holds control characters.", field=path
        )


def _fill_defaults(spec: job_pb2.JobSpec) -> None:
    spec.namespace = spec.namespace or "default"
    spec.queue = spec.queue or "default"
    model = spec.model
    model.name = model.name or spec.name
    model.weight_dtype = model.weight_dtype or "int8"
    model.kv_dtype = model.kv_dtype or "bf16"
    model.kv_block_tokens = model.kv_block_tokens or _DEFAULT_KV_BLOCK_TOKENS
    model.config_digest = hashlib.sha256(model.config.encode()).hexdigest()
    for role in spec.roles:
        role.instances = role.instances or 1
        role.tp = role.tp or 1


def _texts(message: Message, prefix: str) -> list[tuple[str, str]]:
    """(path, text) of every text field inside."""
    found: list[tuple[str, str]] = []
    for field, value in message.ListFields():
        path = f"{prefix}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found += [(f"{path}[{k}]", text) for k, v in value.items() for text in (k, v)]
        elif field.message_type is not None:
            items = value if field.is_repeated else [value]
            for index, item in enumerate(items):
                inner = f"{path}[{index}]." if field.is_repeated else f"{path}."
                found += _texts(item, inner)
        elif field.cpp_type == field.CPPTYPE_STRING:
            items = value if field.is_repeated else [value]
            found += [(path, text) for text in items]
    return found


def spec_digest(message: job_pb2.JobSpec) -> str:
    """Tells a retry from another body under the same idempotency key."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()
