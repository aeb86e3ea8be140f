"""`raddle kv simulate`: files in, the figures by their names out, clear errors for the rest."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from raddle import traces
from raddle.cli.main import app
from raddle.traces.formats import BATCH_S, read_azure, read_servegen, spread

BLOCK_BYTES = 35_979_264
NAMES = {
    "references",
    "unique_blocks",
    "hits",
    "hit_rate",
    "recovery_bytes",
    "unprotected_seconds",
    "blocks_lost",
}


def run(*arguments: object) -> Result:
    command = ["kv", "simulate", *map(str, arguments)]
    return CliRunner().invoke(app, command)


def figures(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--output", "json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert set(found) >= NAMES
    return found


def _short(value: str) -> str:
    return value[-30:]


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    """The first 96 requests of the conversation trace."""
    path = tmp_path / "trace.jsonl"
    text = (resources.files(traces) / "mooncake_conversation.jsonl").read_text()
    path.write_text(text)
    return path


def write_trace(path: Path, *rows: tuple[int, list[int]]) -> Path:
    path.write_text(
        "".join(
            json.dumps(
                {
                    "timestamp": stamp,
                    "input_length": 512 * len(blocks),
                    "output_length": 10,
                    "hash_ids": blocks,
                }
            )
            + "\n"
            for stamp, blocks in rows
        )
    )
    return path


def test_an_infinite_pool_hits_whatever_came_before(mooncake: Path) -> None:
    """References less distinct blocks, counted from the file itself."""
    ids = [json.loads(line)["hash_ids"] for line in mooncake.read_text().splitlines()]
    found = figures("--trace", mooncake)
    assert found["references"] == sum(map(len, ids))
    assert found["unique_blocks"] == len({block for row in ids for block in row})
    assert found["hits"] == found["references"] - found["unique_blocks"]
    assert found["hit_rate"] == pytest.approx(found["hits"] / found["references"])
    assert (found["recovery_bytes"], found["blocks_lost"]) == (0, 0)
    assert "tokens_recomputed" not in found


def test_hosts_fail_drain_and_join_and_ranks_are_lost(mooncake: Path) -> None:
    """All options at once; what is recomputed is a small part of what would be without a pool."""
    lost = [item for rank in range(16) for item in ("--lose-rank", f"9:{rank}")]
    found = figures(
        "--trace", mooncake, "--hosts", 6, "--pool-gib", 200, "--replicas", 2, "--ranks", 32,
        "--fail", "9:0", "--drain", "12:1", "--join", "15:0", "--seed", 3, *lost,
    )  # fmt: skip
    assert found["recovery_bytes"] > 0
    assert found["recovery_bytes"] % BLOCK_BYTES == 0
    assert 0 < found["unprotected_seconds"] < 5
    assert found["blocks_lost"] == 0
    assert found["sequences_lost"] > 0
    assert found["tokens_recomputed"] < 0.2 * found["tokens_recomputed_without_pool"]


def test_the_same_seed_gives_the_same_figures(mooncake: Path) -> None:
    """Everything that is drawn comes from the seed."""
    options = ("--trace", mooncake, "--pool-blocks", 300, "--hosts", 4, "--fail", "5:1")
    assert figures(*options, "--seed", 4) == figures(*options, "--seed", 4)


def test_a_second_past_the_end_is_after_the_last_request(tmp_path: Path) -> None:
    """The last batch is spread beyond its stamp; a failure after the stamp comes later still."""
    trace = write_trace(tmp_path / "t", *[(0, [1, block]) for block in range(2, 9)])
    found = figures("--trace", trace, "--hosts", 1, "--fail", "0.5:0")
    assert found["hits"] == 6
    assert found["blocks_lost"] == 8


def test_a_finite_pool_forgets(tmp_path: Path) -> None:
    """A pool of no more than two copies keeps the two used last."""
    trace = write_trace(tmp_path / "t", (0, [1]), (1000, [2]), (2000, [3]), (4000, [1]))
    assert figures("--trace", trace, "--hosts", 1, "--pool-blocks", 2)["hits"] == 0
    gib = 3 * BLOCK_BYTES / 2**30
    assert figures("--trace", trace, "--hosts", 1, "--pool-gib", gib + 1e-6)["hits"] == 1
    small = figures("--trace", trace, "--hosts", 1, "--pool-gib", 1, "--block-bytes", 2**30)
    assert small["pool_blocks"] == 1


@pytest.mark.parametrize("kind", [".png", ".svg", ".PNG"])
def test_a_plot_is_drawn_on_request(mooncake: Path, tmp_path: Path, kind: str) -> None:
    """An image of the kind that the name says."""
    path = tmp_path / f"plot{kind}"
    figures("--trace", mooncake, "--plot", path, "--hosts", 3, "--fail", "3:1")
    begin = path.read_bytes()[:200]
    assert begin.startswith(b"\x89PNG") if kind.lower() == ".png" else b"svg" in begin


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:17:09.0319600,3180,8\r\n"
)


def test_a_trace_without_ids_has_no_hit_rate_unless_it_is_made_up(tmp_path: Path) -> None:
    """Azure's tokens become blocks that nobody shares; made-up sharing is said to be made up."""
    trace = tmp_path / "azure.csv"
    trace.write_bytes(AZURE.encode())
    found = figures("--trace", trace, "--format", "azure")
    assert found["references"] == found["unique_blocks"] == 10 + 7 + 7
    assert (found["hit_rate"], found["hits"]) == (None, 0)
    made_up = figures("--trace", trace, "--format", "azure", "--synthetic-prefix")
    assert made_up["hit_rate"] > 0
    assert made_up["synthetic_prefix"]
    assert "made up" in made_up["note"]


def servegen(folder: Path) -> Path:
    trace = folder / "chunk-7-trace.csv"
    trace.write_text(
        "0,0,0,,0,0\n600,0.5,1.2,Gamma,0.69,2.88\n1200,0.1,0.9,Weibull,1.28,10.8\n1800,0.2,1,,0,0\n"
    )
    window = {"input_tokens": "{600: 0.5, 1200: 0.5}", "output_tokens": "{9: 1.0}"}
    dataset = {"0": {"input_tokens": "{}"}, "600": window, "1800": window}
    (folder / "chunk-7-dataset.json").write_text(json.dumps(dataset))
    return trace


def test_servegens_windows_become_requests(tmp_path: Path) -> None:
    """As many as the rates say, of the sizes that the histograms hold, inside their windows."""
    trace = servegen(tmp_path)
    requests = read_servegen(trace, Random(0), synthetic_prefix=False)
    assert 250 < len(requests) < 700
    assert all(600 <= request.arrival_s < 2400 for request in requests)
    assert {request.input_tokens for request in requests} == {600, 1200}
    assert {request.output_tokens for request in requests} == {9}
    found = figures("--trace", trace, "--format", "servegen")
    assert found["requests"] == len(requests)
    assert found["hit_rate"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "csv"), "must be one of"),
        (("--fail", "3"), "SECOND:NUMBER"),
        (("--fail", "x:1"), "SECOND:NUMBER"),
        (("--drain", "-1:1"), "at least 0"),
        (("--join", "nan:1"), "at least 0"),
        (("--fail", "3:48"), "no host 48"),
        (("--fail", "3:1", "--fail", "4:1"), "host 1 cannot fail"),
        (("--lose-rank", "3:0"), "needs --ranks"),
        (("--lose-rank", "3:2", "--ranks", "2"), "the ranks are 0 to 1"),
        (("--lose-rank", "3:1", "--lose-rank", "5:1", "--ranks", "2"), "rank 1 is lost twice"),
        (("--synthetic-prefix",), "carries block ids"),
        (("--pool-gib", "inf"), "--pool-gib"),
        (("--pool-gib", "nan"), "less than or equal"),
        (("--pool-gib", "1e300"), "--pool-gib"),
        (("--pool-blocks", "9" * 401), "--pool-blocks"),
        (("--block-bytes", "9" * 401), "--block-bytes"),
        (("--repair-bytes-per-second", "nan"), "less than or equal"),
        (("--write-bytes-per-second", "inf"), "--write-bytes-per-second"),
        (("--pool-gib", "1", "--pool-blocks", "1"), "--pool-blocks"),
        (("--hosts", "0"), "--hosts"),
        (("--hosts", "1025"), "1024"),
        (("--join", "3:1024"), "hosts are 0 to 1023"),
        (("--plot", "x.gif"), ".png or .svg"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_what_makes_no_sense_is_refused(
    mooncake: Path, options: tuple[str, ...], message: str
) -> None:
    """Exit code 2 and a sentence that names the option or the subject."""
    result = run("--trace", mooncake, *options)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("name", ["nowhere/x.png", "folder.svg"])
def test_a_plot_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """Before the trace is read: there is none here."""
    (tmp_path / "folder.svg").mkdir()
    result = run("--trace", tmp_path / "no-trace", "--plot", tmp_path / name)
    assert result.exit_code == 2
    assert "another place" in result.output


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("mooncake", "{"),
        ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1}'),
        ("mooncake", '{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[-1]}'),
        ("mooncake", '{"timestamp":"now","input_length":1,"output_length":1,"hash_ids":[1]}'),
        ("mooncake", ""),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,1\n"),
        ("mooncake", '{"x":' + "[" * 100_000),
        ("azure", "a,b\n1,2\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,-1,1\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,-1\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,99999999999,1\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "9" * 131_073 + ",1,1\n"),
        (
            "azure",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,1,1\n2024-05-10 00:00:01Z,1,1\n",
        ),
        ("servegen", "0,1,1,Gamma,1,1\n"),
    ],
    ids=_short,
)
def test_a_broken_trace_is_named(tmp_path: Path, form: str, text: str) -> None:
    """No traceback: the file, the line and what is wrong with it."""
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    result = run("--trace", path, "--format", form)
    assert result.exit_code == 2
    assert "broken.jsonl" in result.output
    missing = run("--trace", tmp_path / "nothing", "--format", form)
    assert missing.exit_code == 2


@pytest.mark.parametrize(
    ("row", "sizes", "message"),
    [
        ("0,1,1,Weibull,0,1", "{1: 1.0}", "above 0"),
        ("0,1,1,Weibull,1,0", "{1: 1.0}", "above 0"),
        ("0,1,1,Weibull,1e-9,1", "{1: 1.0}", "line 1"),
        ("0,1,1,Gamma,1,1e-300", "{1: 1.0}", "requests"),
        ("0,-1,1,,1,1", "{1: 1.0}", "0 to"),
        ("nan,1,1,,1,1", "{1: 1.0}", "0 to"),
        ("0,1,1,,1,1", "{-1: 1.0}", "-1 tokens"),
        ("0,1,1,,1,1", "{1: -1.0}", "0 to"),
        ("0,1,1,,1,1", "(" * 5_000, "line 1"),
        ("0,1,1,," + "9" * 131_073, "{1: 1.0}", "no CSV"),
    ],
    ids=_short,
)
def test_a_broken_window_is_named(tmp_path: Path, row: str, sizes: str, message: str) -> None:
    """No traceback and no drawing without end: the line and what is wrong with it."""
    trace = servegen(tmp_path)
    trace.write_text(row)
    dataset = {"0": {"input_tokens": sizes, "output_tokens": sizes}}
    (tmp_path / "chunk-7-dataset.json").write_text(json.dumps(dataset))
    result = run("--trace", trace, "--format", "servegen")
    assert result.exit_code == 2
    assert message in result.output


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """A text within a row may hold what other programs take for the end of a line."""
    row = '{"timestamp":0,"input_length":1,"output_length":1,"hash_ids":[1],"x":"\u2028\x85"}\n'
    trace = tmp_path / "trace.jsonl"
    trace.write_text(row * 2)
    assert figures("--trace", trace)["requests"] == 2


def test_azures_times_count_from_the_earliest_row(tmp_path: Path) -> None:
    """Rows are not always in order, and some have a time zone and no fraction of a second."""
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:02.009930+00:00,1,1\n2024-05-10 00:00:00+00:00,2,1\n"
    )
    found = read_azure(trace, Random(0), synthetic_prefix=False)
    assert [(request.arrival_s, request.input_tokens) for request in found] == [
        (0.0, 2),
        (2.00993, 1),
    ]


@given(st.lists(st.integers(0, 40), max_size=40).map(sorted), st.integers(0, 9))
def test_batches_are_spread_in_their_order(stamps: list[int], seed: int) -> None:
    """Nobody arrives before its stamp, nor a batch later, nor before those in front of it."""
    times = [float(stamp) for stamp in stamps]
    arrivals = spread(times, Random(seed))
    assert arrivals == sorted(arrivals)
    for stamp, arrival in zip(times, arrivals, strict=True):
        assert stamp <= arrival < stamp + BATCH_S
        if times.count(stamp) == 1:
            assert arrival == stamp
