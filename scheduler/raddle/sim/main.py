"""`raddle sim`: the real scheduler and agents against drawn faults, in virtual time."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import structlog
import yaml

from raddle.machines import names
from raddle.sim.run import Verdict, simulate

EXIT_FAILED = 1
EXAMPLES = """examples:
  raddle sim                        twenty seeds of a small machine
  raddle sim --seed 7 --trace       one seed, with every line of its trace
  raddle sim --seeds 200 --output json
"""


def summary(verdicts: Sequence[Verdict], cpu_s: float) -> dict[str, Any]:
    """What all seeds together showed, as one JSON value."""
    hits: Counter[str] = Counter()
    options: Counter[str] = Counter()
    for verdict in verdicts:
        hits.update({f"{kind}@{phase}": n for (kind, phase), n in verdict.hits.items()})
        options.update(verdict.options)
    incidents = sum(v.incidents for v in verdicts)
    return {
        "seeds": len(verdicts),
        "failed_seeds": [v.seed for v in verdicts if v.failures],
        "failures": {str(v.seed): list(v.failures) for v in verdicts if v.failures},
        "virtual_s": round(sum(v.virtual_s for v in verdicts), 1),
        "incidents": incidents,
        "commits": sum(v.commits for v in verdicts),
        "leader_terms": sum(v.terms for v in verdicts),
        "incidents_per_cpu_s": round(incidents / max(cpu_s, 1e-9), 1),
        "options": {str(option): n for option, n in sorted(options.items())},
        "faults_by_phase": dict(sorted(hits.items())),
        "digests": {str(v.seed): v.digest for v in verdicts},
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "raddle sim",
        description="Run the real scheduler and agents in one process, over a simulated store,"
        " wire, ranks and clock. Faults are drawn from the seed; then they stop, and everything"
        " must converge. The same seed gives the same run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, help="how many (default 20, or 1 with --seed)")
    parser.add_argument(
        "--machine", default="nvl72", help=f"one of {', '.join(names())}, or a file"
    )
    parser.add_argument("--faults", type=int, default=40, help="faults a seed (default 40)")
    parser.add_argument("--jobs", type=int, default=3, help="jobs a seed (default 3)")
    parser.add_argument("--trace", action="store_true", help="print every line of the traces")
    parser.add_argument(
        "--output", "-o", choices=["table", "json", "yaml"], default="table", help="of the summary"
    )
    found = parser.parse_args(argv)
    if found.seeds is None:
        found.seeds = 1 if found.seed else 20
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = _arguments(argv)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = time.process_time()
    verdicts = []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        verdict = simulate(
            seed, machine=arguments.machine, faults=arguments.faults, jobs=arguments.jobs
        )
        verdicts.append(verdict)
        if arguments.trace:
            sys.stdout.writelines(f"{line}\n" for line in verdict.trace)
        if arguments.output == "table":
            state = "; ".join(verdict.failures) or "converged"
            sys.stdout.write(
                f"seed {seed}: {verdict.incidents} incidents, {verdict.terms} leader terms,"
                f" {verdict.virtual_s:.0f} virtual s, trace {verdict.digest}: {state}\n"
            )
            sys.stdout.flush()
    total = summary(verdicts, time.process_time() - started)
    if arguments.output == "json":
        sys.stdout.write(json.dumps(total) + "\n")
    elif arguments.output == "yaml":
        sys.stdout.write(yaml.safe_dump(total, sort_keys=False))
    else:
        sys.stdout.write(
            f"{total['seeds']} seeds, {len(total['failed_seeds'])} failed, {total['incidents']}"
            f" incidents, {total['incidents_per_cpu_s']} recoveries a core-second\n"
        )
    sys.exit(EXIT_FAILED if total["failed_seeds"] else 0)


if __name__ == "__main__":
    main()
