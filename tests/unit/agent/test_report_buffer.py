from pretrain_agent.worker.report_buffer import ReportBuffer
from pretrain_api.messages.reports import Saved
from support.worker.agent import a_step


def a_save(step: int) -> Saved:
    return Saved(step=step, checkpoint="c", bytes=1, stall_seconds=0, seconds=0)


def test_reports_are_numbered_from_one_without_gaps() -> None:
    reports = ReportBuffer()

    seqs = [reports.add(1, 0.0, a_step(step)).seq for step in range(5)]

    assert seqs == [1, 2, 3, 4, 5]


def test_what_is_not_acknowledged_is_there_again_in_order() -> None:
    reports = ReportBuffer()
    for step in range(5):
        reports.add(1, 0.0, a_step(step))

    reports.acknowledge(2)

    assert [report.seq for report in reports.after(0)] == [3, 4, 5]
    assert [report.seq for report in reports.after(4)] == [5]


def test_the_buffer_is_empty_once_all_is_acknowledged() -> None:
    reports = ReportBuffer()
    assert reports.is_empty
    reports.add(1, 0.0, a_step(1))
    assert not reports.is_empty

    reports.acknowledge(1)

    assert reports.is_empty
    assert list(reports.after(0)) == []


def test_numbers_go_on_after_all_was_acknowledged() -> None:
    reports = ReportBuffer()
    reports.add(1, 0.0, a_step(1))
    reports.acknowledge(1)

    assert reports.add(1, 0.0, a_step(2)).seq == 2


def test_a_long_outage_costs_the_oldest_steps_and_never_a_rare_report() -> None:
    reports = ReportBuffer(max_steps=3)
    reports.add(1, 0.0, a_save(0))
    for step in range(10):
        reports.add(1, 0.0, a_step(step))
    reports.add(1, 0.0, a_save(10))

    kept = [report.body for report in reports.after(0)]

    assert kept == [a_save(0), a_step(7), a_step(8), a_step(9), a_save(10)]
    assert reports.dropped == 7


def test_reports_added_while_others_are_sent_come_in_their_turn() -> None:
    reports = ReportBuffer()
    reports.add(1, 0.0, a_step(1))
    sent = []
    for report in reports.after(0):
        sent.append(report.seq)
        reports.acknowledge(report.seq)
        if report.seq == 1:
            reports.add(1, 0.0, a_step(2))

    sent.extend(report.seq for report in reports.after(sent[-1]))

    assert sent == [1, 2]
