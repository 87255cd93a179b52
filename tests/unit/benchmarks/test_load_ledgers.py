from __future__ import annotations

from benchmarks.load.content import Mark, find_mark, make_mark, make_rest
from benchmarks.load.ledgers import add_verdicts, judge


def test_what_was_answered_and_did_not_arrive_is_lost() -> None:
    verdict = judge(answered=bytes([1, 1, 0, 1]), arrived=bytes([1, 0, 0, 1]))
    assert (verdict.answered, verdict.arrived, verdict.lost, verdict.first_lost) == (3, 2, 1, (1,))


def test_messages_behind_the_last_one_that_arrived_are_lost_too() -> None:
    assert judge(answered=bytes([1, 1, 1]), arrived=bytes([1])).first_lost == (1, 2)


def test_arriving_without_an_answer_is_no_loss() -> None:
    verdict = judge(answered=bytes([0, 1]), arrived=bytes([1, 1]))
    assert (verdict.lost, verdict.arrived, verdict.duplicates) == (0, 2, 0)


def test_each_arrival_more_than_one_is_a_duplicate() -> None:
    assert judge(answered=bytes([1, 1, 1]), arrived=bytes([3, 1, 2])).duplicates == 3


def test_verdicts_of_processes_add_up() -> None:
    whole = add_verdicts([judge(bytes([1, 1]), bytes([1, 0])), judge(bytes([1]), bytes([2]))])
    assert (whole.answered, whole.arrived, whole.lost, whole.duplicates) == (3, 2, 1, 1)


def test_a_message_is_as_large_as_asked_for_and_ends_its_last_line() -> None:
    for size in (400, 4_096, 100_000):
        content = make_mark(1, 12_345, 1_234_567_890_123_456) + make_rest(size, "a@example.org", "b@example.net")
        assert len(content) == size
        assert content.endswith(b"\r\n")
        assert not any(line.startswith(b".") for line in content.split(b"\r\n"))


def test_a_mark_is_found_behind_headers_that_a_relay_put_on_top() -> None:
    content = b"Received: from x\r\n\tby y\r\n" + make_mark(7, 42, 99) + make_rest(500, "a@b.c", "d@e.f")
    assert find_mark(content) == Mark(7, 42, 99)


def test_content_of_others_has_no_mark() -> None:
    assert find_mark(b"Subject: hello\r\nMessage-ID: <1@example.org>\r\n\r\n") is None
    assert find_mark(b"Message-ID: <pb.x.y.z@bench.example.org>\r\n") is None
