import os

import pytest

from flows import doctor


@pytest.mark.parametrize("name", doctor.CODECS)
def test_decoders_really_decode(name):
    finding = doctor._codec(name)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert finding.ok in (True, None)
    assert "8 of 8" in finding.detail or "no encoder" in finding.detail


def test_h264_must_work():
    assert doctor._codec("H.264").ok is True


def test_a_part_that_breaks_is_a_finding():
    def part() -> doctor.Finding:
        raise OSError("no such thing")

    assert doctor._guard("x", part) == doctor.Finding("x", False, "OSError: no such thing")


def test_decord_reads_a_sample():
    assert doctor._decord().ok is True


def test_children_that_fail_say_why():
    import sys

    said = doctor._child([sys.executable, "-c", "raise SystemExit('broken pipe dream')"], 30)
    assert said == "broken pipe dream"
