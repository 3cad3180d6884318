"""Output of commands: styles on terminals only, and never by what strangers wrote; tables and progress bars."""

import os
import subprocess
import sys

import pytest

from lotlip_hf.terminal import progress_bar, text_table

HOSTILE = "\x1b[32mgreen\x1b[0m \x1b[2J.png"
SCRIPT = f"""
import logging
from lotlip_hf.terminal import print_headed, print_tables, run, text_table

def command():
    print_headed("Search:\\n  lotlip search\\n")
    print_tables(text_table([["file"]], [[{HOSTILE!r}], ["-----"]]))
    print({HOSTILE!r})
    logging.getLogger("lotlip_hf.x").warning("%s is damaged", {HOSTILE!r})
    raise ValueError({HOSTILE!r})

run("lotlip", command)
"""


def output_of_a_terminal(**environment: str) -> str:
    """What the script writes to a terminal."""
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    environment = {**known, "TERM": "xterm", **environment}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=end, stderr=end, env=environment)
    os.close(end)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # the end, on Linux
        pass
    os.close(terminal)
    process.wait()
    return written.decode().replace("\r\n", "\n")


def test_styles_on_a_terminal() -> None:
    text = output_of_a_terminal()
    assert "\x1b[1mSearch:\n\x1b[0m  lotlip search\n" in text
    assert "\x1b[31merror:\x1b[0m " in text
    assert "\x1b[33mlotlip: " in text
    table = text[text.index("lotlip search\n") :]
    assert "\x1b[1mfile\n\x1b[0m------" in table
    for code in ("\x1b[32m", "\x1b[2J"):  # of the hostile name
        assert code not in text
    assert text.count("\x1b[") == 8  # on and off: heading, header, warning, error


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_styles_where_they_are_not_wanted(environment: dict[str, str]) -> None:
    text = output_of_a_terminal(**environment)
    assert "error:" in text
    assert "\x1b" not in text


def test_no_styles_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert "error:" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


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


def test_a_closed_standard_output() -> None:
    code = f"import os, sys; sys.stdout = sys.stderr = None; os.close(1)\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


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
