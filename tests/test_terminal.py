"""Output of commands: styles on terminals only, and never by what strangers wrote; tables and progress bars."""

import os
import subprocess
import sys

import pytest

from lotlip_hf.terminal import progress_bar, text_table

HOSTILE = "\x1b[32mgreen\x1b[0m \x1b[2J.png"
END = "the end of a run"
# One process for all runs, each of which takes less than the imports.
SCRIPT = f"""
import logging, os, sys
from lotlip_hf.terminal import print_headed, print_tables, run, text_table

def command():
    print_headed("Search:\\n  lotlip search\\n")
    print_tables(text_table([["file"]], [[{HOSTILE!r}], ["-----"]]))
    print({HOSTILE!r})
    logging.getLogger("lotlip_hf.x").warning("%s is damaged", {HOSTILE!r})
    raise ValueError({HOSTILE!r})

def run_with(**environment):
    os.environ |= {{"NO_COLOR": "", "TERM": "xterm", **environment}}
    assert run("lotlip", command) == 2
    if sys.stdout:
        print({END!r}, flush=True)

run_with()
for descriptor in (1, 2):
    os.dup2(int(sys.argv[1]), descriptor)
os.close(int(sys.argv[1]))
run_with()
run_with(NO_COLOR="1")
run_with(TERM="dumb")
sys.stdout = sys.stderr = None
os.close(1)
run_with()
"""


@pytest.fixture(scope="module")
def written() -> tuple[str, list[str]]:
    """What the script writes to a pipe, and to a terminal in each of its runs."""
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, str(end)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, pass_fds=[end], **pipes) as process:
        os.close(end)
        shown = b""
        try:
            while part := os.read(terminal, 65536):
                shown += part
        except OSError:  # the end, on Linux
            pass
        os.close(terminal)
        piped, _ = process.communicate()
    assert process.returncode == 0, shown
    return piped, shown.decode().replace("\r\n", "\n").split(f"{END}\n")


def test_styles_on_a_terminal(written: tuple[str, list[str]]) -> None:
    text = written[1][0]
    assert "\x1b[1mSearch:\n\x1b[0m  lotlip search\n" in text
    assert "\x1b[31merror:\x1b[0m " in text
    assert "\x1b[33mlotlip: " in text
    table = text[text.index("lotlip search\n") :]
    assert "\x1b[1mfile\n\x1b[0m------" in table
    for code in ("\x1b[32m", "\x1b[2J"):  # of the hostile name
        assert code not in text
    assert text.count("\x1b[") == 8  # on and off: heading, header, warning, error


def test_no_styles_where_they_are_not_wanted(written: tuple[str, list[str]]) -> None:
    """In a pipe, with `NO_COLOR`, and with `TERM=dumb`."""
    piped, (_, no_color, dumb, _) = written
    for text in (piped, no_color, dumb):
        assert "error:" in text
        assert "\x1b" not in text


def test_a_closed_standard_output(written: tuple[str, list[str]]) -> None:
    assert written[1][-1] == ""


def test_a_table_is_aligned() -> None:
    table = text_table([["", "R@1", "R@1"], ["model", "I2T", "T2I"]], [["a\nb", "1.00", "22.00"], ["c", "-", "3.00"]])
    assert table.splitlines() == [
        "           R@1",
        "model   I2T    T2I",
        "-----  ----  -----",
        "a\\nb   1.00  22.00",
        "c         -   3.00",
    ]
    assert text_table([["file", "x"]], [["猫.png", "1"], ["e\u0301", "2"]], rule=False).splitlines() == [
        *("file    x", "猫.png  1", "e\u0301       2")
    ]


def test_a_bar_names_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress_bar(range(3), desc="Reading", unit="image"):
        pass
    shown = capsys.readouterr().err
    assert "Reading: 100%" in shown
    assert "3/3 images [" in shown
    with progress_bar(desc="Reading", unit="image") as bar:
        bar.update(2)
    assert "Reading: 2 images [" in capsys.readouterr().err
    for _ in progress_bar(range(3), desc="Reading", unit="image", shown=False):
        pass
    assert capsys.readouterr().err == ""
