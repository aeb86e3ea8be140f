"""`raddle certificates`: made once, kept while they are good, renewed before they end."""

from __future__ import annotations

import base64
import datetime as dt
import json
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from kubernetes.client.exceptions import ApiException
from typer.testing import CliRunner

from raddle.cli.certificates.authority import Authority, Pair, Wanted, wanted
from raddle.cli.certificates.keep import AUTHORITY, Done, Folder, Lifetimes, bring_up_to_date
from raddle.cli.certificates.secrets import IDENTITIES, Secrets, wanted_secrets
from raddle.cli.main import app
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.telemetry.tls import AGENT_NAME, RANK_NAME, SCHEDULER_NAME, tls_files

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
WANTS = [wanted("scheduler"), wanted("agent/sn0/n00"), wanted("client/admin")]
WANTS.append(wanted("etcd", ("etcd.example", "10.0.0.7")))
WANTS += [wanted("rank"), wanted("frontdoor")]


def run(folder: Path, now: dt.datetime = NOW, wants: Any = None) -> dict[str, Done]:
    done = bring_up_to_date(Folder(folder), wants or WANTS, now, Lifetimes())
    return {one.name: one for one in done}


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())


def test_each_identity_has_its_name_and_its_purpose(tmp_path: Path) -> None:
    """Servers carry their kind's name, agents the ranks' too, clients none."""
    run(tmp_path)
    names = {"scheduler": {SCHEDULER_NAME}, "client-admin": set(), "frontdoor": set()}
    names |= {"agent-sn0-n00": {AGENT_NAME, RANK_NAME}, "rank": {RANK_NAME}}
    names["etcd"] = {"etcd.example", "10.0.0.7", "localhost", "127.0.0.1"}
    for name, servers in names.items():
        found = certificate(tmp_path, name)
        (identity,) = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert str(identity.value).replace("/", "-") == name
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usage) is bool(servers)
        assert ExtendedKeyUsageOID.CLIENT_AUTH in usage
        if servers:
            kind = x509.SubjectAlternativeName
            listed = found.extensions.get_extension_for_class(kind).value
            assert {str(one.value) for one in listed} == servers


def test_the_daemons_accept_what_is_made(tmp_path: Path) -> None:
    """Each pair loads with the authority, and a strict TLS library finds the chain good."""
    bring_up_to_date(Folder(tmp_path), WANTS, dt.datetime.now(dt.UTC), Lifetimes())
    for name in ("scheduler", "agent-sn0-n00", "client-admin", "etcd"):
        paths = (str(tmp_path / file) for file in ("ca.crt", f"{name}.crt", f"{name}.key"))
        assert tls_files(*paths) is not None
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "scheduler.crt", tmp_path / "scheduler.key")
    sides = [
        client.wrap_bio(one, other, server_hostname=SCHEDULER_NAME),
        server.wrap_bio(other, one, server_side=True),
    ]
    for side in (*sides, *sides):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert sides[0].version() == "TLSv1.3"


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    """What is good stays, byte for byte; keys are readable by their owner alone."""
    assert {one.action for one in run(tmp_path).values()} == {"made"}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {one.action for one in run(tmp_path, NOW + 200 * DAY).values()} == {"kept"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.key")} == {0o600}


def test_what_ends_soon_is_renewed_under_the_same_authority(tmp_path: Path) -> None:
    """Within the time before its end a certificate is made anew, the authority is not."""
    run(tmp_path)
    authority = (tmp_path / "ca.crt").read_bytes()
    done = run(tmp_path, NOW + 246 * DAY)
    assert done.pop(AUTHORITY).action == "kept"
    assert {one.action for one in done.values()} == {"renewed"}
    assert "2027-01-01" in done["scheduler"].why
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert certificate(tmp_path, "etcd").not_valid_after_utc == NOW + (246 + 365) * DAY


def test_what_is_unfit_is_renewed_with_the_reason(tmp_path: Path) -> None:
    """Noise, another's key, another authority's certificate and changed hosts do not stay."""
    run(tmp_path)
    (tmp_path / "scheduler.crt").write_text("noise")
    (tmp_path / "client-admin.key").write_bytes((tmp_path / "etcd.key").read_bytes())
    foreign = Authority.create(NOW).issue(wanted("agent/sn0/n00"), NOW, NOW + 365 * DAY)
    (tmp_path / "agent-sn0-n00.crt").write_bytes(foreign.certificate)
    (tmp_path / "agent-sn0-n00.key").write_bytes(foreign.key)
    done = run(tmp_path, wants=[*WANTS[:3], wanted("etcd", ("elsewhere",)), *WANTS[4:]])
    assert {name: one.why for name, one in done.items() if one.action == "renewed"} == {
        "scheduler": "it is no certificate with its key in PEM",
        "client-admin": "its key is another one's",
        "agent-sn0-n00": "another authority signed it",
        "etcd": "its names changed",
    }
    assert {one.action for one in run(tmp_path, wants=WANTS[:3]).values()} == {"kept"}


def test_an_upgrade_renews_what_an_older_release_made(tmp_path: Path) -> None:
    """An agent's certificate that lacks the ranks' name is renewed, under the same authority."""
    run(tmp_path, wants=[WANTS[0], Wanted("agent/sn0/n00", (AGENT_NAME,))])
    before = (tmp_path / "ca.crt").read_bytes()
    done = run(tmp_path)
    assert (done["agent-sn0-n00"].action, done["agent-sn0-n00"].why) == (
        "renewed",
        "its names changed",
    )
    assert [done[name].action for name in ("scheduler", "rank", "frontdoor")] == [
        "kept",
        "made",
        "made",
    ]
    assert (tmp_path / "ca.crt").read_bytes() == before


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    """In the authority's last year certificates end with it and are not renewed in vain."""
    run(tmp_path)
    late = NOW + (3650 - 30) * DAY
    assert run(tmp_path, late)["scheduler"].action == "renewed"
    end = certificate(tmp_path, "ca").not_valid_after_utc
    assert certificate(tmp_path, "scheduler").not_valid_after_utc == end
    assert run(tmp_path, late)["scheduler"].action == "kept"


def test_an_authority_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    """An ended authority, and one without its own key, change nothing and say what to do."""
    run(tmp_path)
    with pytest.raises(PermanentError, match="ended on 2035-12-30: delete it"):
        run(tmp_path, NOW + 3651 * DAY)
    (tmp_path / "ca.key").write_bytes((tmp_path / "etcd.key").read_bytes())
    with pytest.raises(PermanentError, match="another key than its certificate"):
        run(tmp_path)


def test_the_command_writes_a_folder_that_the_daemons_take(tmp_path: Path) -> None:
    """`raddle certificates create` makes all identities and shows what it did as data."""
    folder = tmp_path / "pki"
    nodes = ["--agent", "sn0/n00", "--agent", "sn0/n01"]
    nodes += ["--client", "team-a", "--front-door", "team-a"]
    command = ["certificates", "create", "--out", str(folder), *nodes, "--output", "json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    made = [one["name"] for one in json.loads(result.stdout)["certificates"]]
    assert made == [
        *("ca", "scheduler", "operator", "client-admin", "rank", "frontdoor"),
        *("agent-sn0-n00", "agent-sn0-n01", "client-team-a", "frontdoor-team-a"),
    ]
    assert all((folder / f"{name}.key").exists() for name in made)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--days", "30"], "fewer"),
        (["--out", "/dev/null/pki"], "/dev/null"),
    ],
)
def test_the_command_refuses_nonsense(
    flags: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A life shorter than the time before renewal and an impossible folder end with code 2."""
    command = ["certificates", "create", "--out", str(tmp_path), *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert word in result.stderr


class Api:
    """Secrets of one namespace, with the errors of the real API."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        self.refuses: int | None = None

    def _check(self) -> None:
        if self.refuses is not None:
            raise ApiException(status=self.refuses, reason="so")

    def read_namespaced_secret(self, name: str, namespace: str, **_: Any) -> Any:
        self._check()
        if name not in self.secrets:
            raise ApiException(status=404, reason="Not Found")
        return SimpleNamespace(data=self.secrets[name]["data"])

    def create_namespaced_secret(self, namespace: str, body: dict[str, Any], **_: Any) -> None:
        if body["metadata"]["name"] in self.secrets:
            raise ApiException(status=409, reason="Conflict")
        self.secrets[body["metadata"]["name"]] = body

    def patch_namespaced_secret(
        self, name: str, namespace: str, body: dict[str, Any], **_: Any
    ) -> None:
        self.secrets[name]["data"] |= body["data"]


def keep_secrets(api: Api, now: dt.datetime = NOW) -> dict[str, str]:
    secrets = Secrets(api, "space", "raddle")
    done = bring_up_to_date(secrets, wanted_secrets(("raddle-etcd",)), now, Lifetimes())
    return {one.name: one.action for one in done}


def test_secrets_are_what_pods_mount() -> None:
    """One Secret an identity, of the type and with the keys that cert-manager writes."""
    api = Api()
    assert set(keep_secrets(api).values()) == {"made"}
    assert set(api.secrets) == {f"raddle-tls-{who}" for who in ("ca", *IDENTITIES)}
    authority = api.secrets["raddle-tls-ca"]["data"]["tls.crt"]
    for secret in api.secrets.values():
        assert secret["type"] == "kubernetes.io/tls"
        assert set(secret["data"]) == {"ca.crt", "tls.crt", "tls.key"}
        assert secret["data"]["ca.crt"] == authority
    agent = base64.b64decode(api.secrets["raddle-tls-agent"]["data"]["tls.crt"])
    assert x509.load_pem_x509_certificate(agent).subject.rfc4514_string() == "CN=agent/*"
    for who in ("rank", "frontdoor"):
        own = base64.b64decode(api.secrets[f"raddle-tls-{who}"]["data"]["tls.crt"])
        assert x509.load_pem_x509_certificate(own).subject.rfc4514_string() == f"CN={who}"
    before = json.dumps(api.secrets)
    assert set(keep_secrets(api).values()) == {"kept"}
    assert json.dumps(api.secrets) == before
    assert keep_secrets(api, NOW + 300 * DAY)["agent-all"] == "renewed"


def test_without_an_etcd_of_its_own_a_release_has_no_certificate_for_one() -> None:
    """External etcd has certificates of its own."""
    assert "etcd" not in [what.identity for what in wanted_secrets(())]


def test_a_run_that_is_second_takes_what_the_first_made() -> None:
    """Two runs at once end with one authority, which signed all certificates that are kept."""
    first, second = Api(), Api()
    second.secrets = first.secrets
    theirs: list[Pair] = []

    def read_late(name: str, namespace: str, **_: Any) -> Any:
        """The second run sees nothing at first; meanwhile the first makes everything."""
        if not theirs:
            keep_secrets(first)
            theirs.append(Pair(b"", b""))
            raise ApiException(status=404, reason="Not Found")
        return Api.read_namespaced_secret(second, name, namespace)

    second.read_namespaced_secret = read_late  # type: ignore[method-assign]
    assert set(keep_secrets(second).values()) == {"kept"}


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (403, PermanentError, Reason.PERMISSION_DENIED),
        (500, TemporaryError, Reason.STORE_UNAVAILABLE),
    ],
)
def test_an_api_that_refuses_is_named(status: int, kind: type, reason: Reason) -> None:
    """A missing right and an API server in trouble name the Secret and what to do."""
    api = Api()
    api.refuses = status
    with pytest.raises(kind, match="Secret space/raddle-tls-ca") as caught:
        keep_secrets(api)
    assert caught.value.reason is reason  # type: ignore[attr-defined]
