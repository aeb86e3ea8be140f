"""What the demonstration prints: each incident's timeline and plan, and the result."""

from __future__ import annotations

import sys
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from raddle.cli.session import print_data
from raddle.v1 import incident_pb2, job_pb2

if TYPE_CHECKING:
    from raddle.cli.demo.run import Demo


def _phase(entry: Any) -> str:
    return incident_pb2.IncidentPhase.Name(entry.phase).removeprefix("INCIDENT_PHASE_").lower()


def _ms(entry: Any) -> float:
    return float(entry.duration.seconds * 1e3 + entry.duration.nanos / 1e6)


def phases_ms(incident: Any) -> dict[str, float]:
    """Milliseconds of each phase; a phase that was entered again counts together."""
    found: dict[str, float] = {}
    for entry in incident.timeline:
        found[_phase(entry)] = round(found.get(_phase(entry), 0.0) + _ms(entry), 3)
    return found


def print_incident(incident: Any) -> None:
    """Timeline, plan, and why not otherwise."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=False)
    console.print(f"\n[bold]Incident {incident.id}[/bold]  {incident.subject}")
    console.print(f"  {incident.why.message}", highlight=False)
    timeline = Table("phase", "ms", "what", box=None, pad_edge=False)
    for entry in incident.timeline:
        timeline.add_row(_phase(entry), f"{_ms(entry):.1f}", entry.message)
    console.print(timeline)
    for plan in incident.plans:
        for instance in plan.instances:
            console.print(
                f"  epoch {plan.epoch}: {instance.role}/{instance.instance} {instance.option}:"
                f" {instance.experts_moved} experts move, {instance.sequences_restored} sequences"
                f" continue ({instance.kv_tokens_restored} tokens from the pool,"
                f" {instance.kv_tokens_recomputed} computed anew)",
                highlight=False,
            )
            for option in instance.considered:
                verdict = "chosen" if option.chosen else "no"
                line = f"    {option.option:<11} {verdict:<7} {option.why.message}"
                console.print(line, highlight=False)


def document(demo: Demo) -> dict[str, Any]:
    """The result as one JSON document; its keys are an interface."""
    compared = different = 0
    for number in range(len(demo.requests)):
        pairs = zip_longest(
            demo.undisturbed.tokens.get(number, []), demo.disturbed.tokens.get(number, [])
        )
        for before, after in pairs:
            compared += 1
            different += before != after
    plans = [p for i in demo.incidents for job in i.plans for p in job.instances]
    return {
        "jobs": [
            {
                "uid": job.uid,
                "name": job.spec.name,
                "state": job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_"),
                "epoch": job.epoch,
            }
            for job in demo.jobs
        ],
        "incidents": [_incident(incident) for incident in reversed(demo.incidents)],
        "requests_sent": 2 * len(demo.requests),
        "requests_finished": demo.undisturbed.finished + demo.disturbed.finished,
        "tokens_compared": compared,
        "tokens_different": different,
        "experts_moved": sum(plan.experts_moved for plan in plans),
        "kv_tokens_restored": demo.kv.get("raddle_frontdoor_kv_tokens_restored_total", 0),
        "kv_tokens_recomputed": demo.kv.get("raddle_frontdoor_kv_tokens_recomputed_total", 0),
    }


def _incident(incident: Any) -> dict[str, Any]:
    plan = [
        {
            "role": p.role,
            "instance": p.instance,
            "option": p.option,
            "lost_ranks": list(p.lost_ranks),
            "experts_moved": p.experts_moved,
            "why": p.why.message,
        }
        for job in incident.plans
        for p in job.instances
    ]
    return {
        "id": incident.id,
        "subject": incident.subject,
        "why": incident.why.message,
        "plan": plan,
        "phases_ms": phases_ms(incident),
    }


def show_result(result: dict[str, Any], output: str) -> None:
    """One JSON or YAML document, or what people want to know."""
    if output != "table":
        print_data(result, output)
        return
    same = "all the same" if result["tokens_different"] == 0 else "NOT THE SAME"
    sys.stdout.write(
        f"\n{result['requests_finished']} of {result['requests_sent']} requests finished;"
        f" {result['tokens_compared']} tokens compared, {result['tokens_different']} different:"
        f" {same}\n{result['experts_moved']} experts were loaded anew;"
        f" {result['kv_tokens_restored']} tokens of KV restored from the pool,"
        f" {result['kv_tokens_recomputed']} recomputed\n"
    )
