from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load.__main__ import parse
from benchmarks.load.job import Job, JobError, job_from_json
from benchmarks.load.latency import Timeline, percentiles
from benchmarks.load.ledgers import Verdict
from benchmarks.load.plot import draw
from benchmarks.load.report import as_json, medians, progress_line, ratios, run_table, summary_table
from benchmarks.load.results import RunResult, Stream, StreamResult, rows
from benchmarks.load.run import Progress, shares

_SECOND_NS = 1_000_000_000
_JOB = Job(stream=0, port=25, sender="a@b", recipient="c@d", ledger_file="", deadline_s=10.0, messages=100)


def stream_result(*, per_second: float = 100.0, dot_us: int = 2_000) -> StreamResult:
    dots, none = Timeline(), Timeline()
    for second in (5, 7):
        dots.record(second * _SECOND_NS, dot_us * 1_000)
    timelines = {"connect": none, "dot": dots, "message": dots, "arrival": dots}
    return StreamResult(
        is_mail=True,
        verdict=Verdict(answered=2, arrived=2, lost=0, duplicates=0),
        begun=3,
        unanswered=0,
        errors={"452": 1},
        answered_per_s=per_second,
        delivered_per_s=per_second,
        latency_ms={name: percentiles(timeline.total())._asdict() for name, timeline in timelines.items()},
        timeline=rows(5 * _SECOND_NS, timelines, [{5: 10, 6: 20}]),
    )


def run_result(peer: str = "postroad", phase: str = "load", **more: float) -> RunResult:
    return RunResult(
        peer=peer,
        seconds=3.0,
        streams={"load": stream_result(per_second=more.get("per_second", 100.0))},
        others_cores=0.1,
        cpu_s={"worker": 0.001, "total": 0.001},
        cpu_us_per_message={"worker": 500.0, "total": 500.0},
        load_cpu_us_per_message={"clients": 60.0, "sink": 20.0},
        phase=phase,
    )


def test_the_timeline_has_a_row_for_every_second_also_for_those_in_which_nothing_ended() -> None:
    timeline = stream_result().timeline
    assert [(row["second"], row["answered"], row["open"]) for row in timeline] == [(0, 1, 10), (1, 0, 20), (2, 1, 0)]
    assert timeline[0]["dot_p95_ms"] == pytest.approx(2.0, rel=0.02)


def test_what_the_sink_shall_do_wrong_is_handed_on_to_it() -> None:
    options = parse(["closed", "--drop-every", "50", "--delay-ms", "2.5"])
    assert options.sink_options == ("--drop-every", "50", "--delay-ms", "2.5")


def test_the_json_is_complete_and_plain(tmp_path: Path) -> None:
    options = parse(["closed", "--json", str(tmp_path / "out.json")])
    report = json.loads(json.dumps(as_json(options, [run_result()])))
    assert set(report) == {
        *("format", "scenario", "options", "machine", "conditions", "runs", "medians", "ratios", "problems"),
    }
    (run,) = report["runs"]
    assert set(run["streams"]["load"]) == {
        *("is_mail", "verdict", "begun", "unanswered", "errors", "answered_per_s", "delivered_per_s"),
        *("latency_ms", "timeline"),
    }
    assert run["streams"]["load"]["latency_ms"]["dot"]["values"] == 2
    assert report["options"]["sessions"] == 1_000


def test_problems_of_all_runs_stand_at_the_end_of_the_json() -> None:
    bad = run_result()
    bad.problems.append("3 messages did not arrive")
    assert as_json(parse(["closed"]), [run_result(), bad])["problems"] == ["3 messages did not arrive"]
    assert "PROBLEM: 3 messages did not arrive" in run_table(bad)


def test_medians_are_of_rounds_and_ratios_of_peers() -> None:
    results = [run_result(per_second=rate) for rate in (300.0, 100.0, 200.0)]
    results += [run_result("postfix", per_second=rate) for rate in (50.0, 60.0, 40.0)]
    assert medians(results)["postroad"]["answered_per_s"] == 200.0
    assert ratios(results)["postroad / postfix"]["answered_per_s"] == 4.0
    assert "postroad / postfix" in summary_table(results)


def test_a_disturbed_phase_is_set_in_relation_to_the_one_before_it() -> None:
    results = [run_result(phase="alone"), run_result(phase="disturbed", per_second=50.0)]
    assert ratios(results)["postroad disturbed / postroad alone"]["answered_per_s"] == 0.5


def test_a_run_without_messages_has_a_table_and_no_cpu_a_message() -> None:
    idle = run_result()
    idle.cpu_us_per_message = idle.load_cpu_us_per_message = {}
    assert "CPU ms" in run_table(idle)


def test_the_progress_line_says_rate_open_connections_latency_and_errors() -> None:
    line = progress_line(Progress(2.0, 500, 400, 390, 20, 3, percentiles({100: 400})))
    assert "200/s" in line
    assert "open     20" in line
    assert "errors 3" in line


def test_the_plot_is_well_formed_and_has_a_colour_for_each_peer() -> None:
    root = ET.fromstring(draw("closed <&>", [run_result(), run_result("postfix")]))  # noqa: S314 - made here
    colours = {line.get("stroke") for line in root.iter("{http://www.w3.org/2000/svg}polyline")}
    assert len(colours) == 2


def test_a_plot_of_nothing_is_still_a_plot() -> None:
    empty = run_result()
    empty.streams["load"].timeline.clear()
    ET.fromstring(draw("idle", [empty]))  # noqa: S314 - made here


def test_processes_share_sessions_messages_and_rate_without_a_rest(tmp_path: Path) -> None:
    job = replace(_JOB, sessions=5, messages=11, rate=10.0)
    jobs = shares(Stream("load", job, processes=3), tmp_path)
    assert [each.sessions for each in jobs] == [2, 2, 1]
    assert [each.messages for each in jobs] == [4, 4, 3]
    assert sum(each.rate for each in jobs) == pytest.approx(10.0)
    assert len({each.stream for each in jobs}) == len({each.ledger_file for each in jobs}) == 3


def test_there_are_never_more_processes_than_sessions_or_messages(tmp_path: Path) -> None:
    assert len(shares(Stream("load", replace(_JOB, sessions=2), processes=4), tmp_path)) == 2
    assert len(shares(Stream("load", replace(_JOB, sessions=9, messages=1), processes=4), tmp_path)) == 1


@pytest.mark.parametrize("change", [{"messages": 0}, {"deadline_s": 0.0}, {"sessions": 0}, {"idle": True}])
def test_a_job_without_an_end_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(JobError):
        job_from_json(json.dumps({**json.loads(_JOB.to_json()), **change}))


@pytest.mark.parametrize("words", [["closed", "--messages", "0"], ["closed", "--sessions", "0"], ["unknown"]])
def test_a_run_without_an_end_or_sense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(words)
    assert ended.value.code == 2
    assert "postroad-bench" in capsys.readouterr().err
