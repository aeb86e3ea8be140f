"""Commands about certificates: made once, kept while they are good, renewed before they end."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raddle.cli.options import Output, output_of
from raddle.model.errors import PermanentError, RaddleError, Reason

if TYPE_CHECKING:
    from raddle.cli.certificates.authority import Wanted
    from raddle.cli.certificates.keep import Done, Keeper

app = typer.Typer(
    name="certificates",
    help="One authority and a certificate for each identity. What is good stays; what is missing,"
    " unfit or ends soon is made anew, so run it as often as you like.\n\n"
    "Example: `raddle certificates create --out pki --agent sn0/n00`",
)
Days = Annotated[int, typer.Option(help="days that a new certificate is good for", min=1)]
RenewBefore = Annotated[int, typer.Option(help="days before its end to renew one", min=0)]
EtcdHosts = Annotated[
    list[str] | None, typer.Option(help="host name or address of etcd; may be repeated")
]


@app.command()
def create(  # noqa: PLR0913, PLR0917 - an option is a parameter
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="folder of the PEM files; keep `ca.key` in it safe")],
    agent: Annotated[
        list[str] | None, typer.Option(help="node with an agent, sn0/n07, or *; may be repeated")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="name of a client beside admin; may be repeated")
    ] = None,
    front_door: Annotated[
        list[str] | None,
        typer.Option(help="name of a front door of some namespaces alone; may be repeated"),
    ] = None,
    etcd_host: EtcdHosts = None,
    days: Days = 365,
    renew_before_days: RenewBefore = 120,
    output: Output = "",
) -> None:
    """Write certificates as PEM files, for machines without Kubernetes.

    Example: `raddle certificates create --out pki --agent sn0/n00 --etcd-host 10.0.0.7`
    """
    identities = ["scheduler", "operator", "client/admin", "rank", "frontdoor"]
    identities += [f"agent/{node}" for node in agent or ["*"]]
    identities += [f"client/{name}" for name in client or []]
    identities += [f"frontdoor/{name}" for name in front_door or []]
    hosts = tuple(etcd_host or ())
    if hosts:
        identities.append("etcd")

    def keeper() -> Keeper:
        from raddle.cli.certificates.keep import Folder

        return Folder(out)

    def wants() -> list[Wanted]:
        from raddle.cli.certificates.authority import wanted

        return [wanted(identity, hosts) for identity in dict.fromkeys(identities)]

    _run(ctx, output, keeper, wants, days, renew_before_days)


@app.command()
def kubernetes(
    ctx: typer.Context,
    namespace: Annotated[str, typer.Option(help="namespace of the Secrets")],
    release: Annotated[str, typer.Option(help="name of the Helm release")] = "raddle",
    etcd_host: EtcdHosts = None,
    days: Days = 365,
    renew_before_days: RenewBefore = 120,
    output: Output = "",
) -> None:
    """Keep certificates as Secrets, which the chart's pods mount; its hook runs this.

    Example: `raddle certificates kubernetes --namespace raddle --etcd-host raddle-etcd`
    """

    def keeper() -> Keeper:
        from raddle.cli.certificates.secrets import Secrets, connect

        return Secrets(connect(), namespace, release)

    def wants() -> list[Wanted]:
        from raddle.cli.certificates.secrets import wanted_secrets

        return wanted_secrets(tuple(etcd_host or ()))

    _run(ctx, output, keeper, wants, days, renew_before_days)


def _run(
    ctx: typer.Context,
    output: str,
    keeper: Callable[[], Keeper],
    wants: Callable[[], list[Wanted]],
    days: int,
    renew_before_days: int,
) -> None:
    """Do it, and show what was done."""
    from raddle.cli.session import fail, print_data, print_table

    form = output_of(ctx, output)
    try:
        done = _bring_up_to_date(keeper, wants, days, renew_before_days)
    except ModuleNotFoundError as error:
        why = f"{error.name} is not installed: `pip install raddle[operator]`."
        fail(PermanentError(Reason.INVALID_ARGUMENT, why))
    except OSError as error:
        why = f"{error.filename}: {error.strerror}."
        fail(PermanentError(Reason.INVALID_ARGUMENT, why))
    except RaddleError as error:
        fail(error)
    if form == "table":
        rows = [[one.name, one.action, one.why] for one in done]
        print_table(["CERTIFICATE", "ACTION", "WHY"], rows)
    else:
        print_data({"certificates": [asdict(one) for one in done]}, form)


def _bring_up_to_date(
    keeper: Callable[[], Keeper],
    wants: Callable[[], list[Wanted]],
    days: int,
    renew_before_days: int,
) -> list[Done]:
    from raddle.cli.certificates.keep import Lifetimes, bring_up_to_date

    lifetimes = Lifetimes(dt.timedelta(days=days), dt.timedelta(days=renew_before_days))
    return bring_up_to_date(keeper(), wants(), dt.datetime.now(dt.UTC), lifetimes)


def register(root: typer.Typer) -> None:
    root.add_typer(app)
