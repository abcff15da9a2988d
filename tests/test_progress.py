"""Progress: a bar on a terminal, lines in a log."""

import io
import sys

from samer.runtime.progress import Progress


def test_a_log_gets_plain_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(Progress(range(3), "images", unit="images")) == [0, 1, 2]
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("images: 0 of 3 images, ")
    assert lines[-1].startswith("images: 3 of 3 images, ")
    assert len(lines) == 2
    assert "\r" not in log.getvalue()


def test_other_processes_are_silent(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("RANK", "1")
    assert list(Progress(range(3), "images")) == [0, 1, 2]
    assert log.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(Progress(range(3), "images", mininterval=0)) == [0, 1, 2]
    assert "3/3" in terminal.getvalue()
    assert "\r" in terminal.getvalue()
