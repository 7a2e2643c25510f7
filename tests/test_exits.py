"""How a process ends: with everything done, and at once."""

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, logging, logging.handlers, os, sys, threading, time, weakref
from pipeline.exits import leave_with

class Held:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")

def main():
    global held
    kept = logging.handlers.MemoryHandler(100, target=logging.StreamHandler(sys.stdout), flushOnClose=True)
    logging.getLogger("kept").addHandler(kept)
    logging.getLogger("kept").warning("a line of the log")
    held = Held()
    weakref.finalize(held, print, "what is finalised")
    atexit.register(print, "what was registered")
    print("the last line")
    threading.Thread(target=lambda: (time.sleep(0.1), print("the thread"))).start()
    {end}

{call}
"""


def run(end: str, call: str = "leave_with(main)") -> tuple[list[str], str, int]:
    """Lines printed, errors and exit code."""
    program = [sys.executable, "-c", _PROGRAM.format(end=end, call=call)]
    answer = subprocess.run(program, capture_output=True, text=True, timeout=60)
    return answer.stdout.splitlines(), answer.stderr, answer.returncode


@pytest.mark.parametrize(("end", "code"), [("return 0", 0), ("return 3", 3), ("sys.exit(2)", 2), ("sys.exit()", 0)])
def test_everything_is_done_before_the_end(end: str, code: int) -> None:
    lines, errors, found = run(end)
    assert lines[:2] == ["the last line", "the thread"]
    assert sorted(lines[2:]) == ["a line of the log", "what is finalised", "what was registered"]
    assert (errors, found) == ("", code)


def test_what_goes_wrong_ends_the_process_as_ever() -> None:
    lines, errors, code = run("raise ValueError('wrong')")
    assert len(lines) == 6
    assert errors.endswith("ValueError: wrong\n")
    assert code == 1


def test_the_process_is_not_taken_apart() -> None:
    """Which takes seconds where torch has been imported, and is what the program above would tell of."""
    assert run("return 0", "sys.exit(main())")[0][-1] == "taken apart"
    assert "taken apart" not in run("return 0")[0]


def test_a_message_is_printed_as_ever() -> None:
    _, errors, code = run("sys.exit('what went wrong')")
    assert (errors, code) == ("what went wrong\n", 1)


def test_output_that_nobody_reads_is_an_error() -> None:
    """As of any Python program, whose exit code is 120 then."""
    program = "from pipeline.exits import leave_with; leave_with(lambda: print('unread') or 0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered
    )
    assert process.stdout is not None
    process.stdout.close()
    assert b"BrokenPipeError" in process.communicate(timeout=60)[1]
    assert process.returncode == 120


def test_a_mistyped_subcommand_is_answered_at_once() -> None:
    """Without importing torch, which alone takes seconds."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", "fti"], capture_output=True, text=True, timeout=60
    )
    assert "did you mean fit?" in answer.stderr
    assert answer.returncode == 2
    assert not any(line.endswith((" torch", " lightning")) for line in answer.stderr.splitlines())
