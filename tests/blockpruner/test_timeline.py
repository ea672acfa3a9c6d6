"""The timeline: busy and present seconds of replicas, with interruptions left out."""

import pytest

from blockpruner.reporting.timeline import draw_timeline, utilisation


def unit(replica: str, start_s: float, stop_s: float, step: int = 1) -> dict[str, object]:
    return {"type": "unit", "replica": replica, "start_s": start_s, "stop_s": stop_s, "step": step}


def test_a_replica_that_waits_for_half_of_its_time_is_used_by_half() -> None:
    events = [
        unit("a", 1000, 1010),
        unit("a", 1020, 1030),
        unit("a", 1040, 1040),
        {"type": "note", "at_s": 1, "text": ""},
    ]
    assert utilisation(events) == pytest.approx(0.5)


def test_hours_between_an_interrupt_and_its_resume_do_not_count() -> None:
    events = [unit("a", 1000, 1010), unit("b", 1000, 1010), unit("a", 9000, 9010), unit("b", 9000, 9010)]
    assert utilisation(events) == pytest.approx(1.0)


def test_a_replica_that_joins_late_is_counted_from_its_first_unit() -> None:
    assert utilisation([unit("a", 1000, 1020), unit("b", 1010, 1020)]) == pytest.approx(1.0)


def test_the_picture_has_a_row_for_each_replica_and_a_bar_for_each_unit() -> None:
    events = [unit(f"replica-{index}", 1000 + index, 1010 + index) for index in range(12)]
    events.append({"type": "note", "at_s": 1005.0, "text": "replica-3 is lost: its node is gone"})
    axes = draw_timeline(events).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"replica-{index}" for index in range(12)]
    assert len(axes.patches) == 12
    assert axes.get_xlim() == (0, 21)
