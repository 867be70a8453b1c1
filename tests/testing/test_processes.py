"""Programs that the kit starts: what they say is heard, and none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gostnet.testing.processes import Process, ProcessFailed, gostnet, run_program

PYTHON = [sys.executable, "-I", "-S", "-c"]


def alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_end(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not alive(pid)


@pytest.fixture
def doomed() -> Iterator[Callable[[int], int]]:
    """Remember pids that must be dead at the end, whatever the test does."""
    pids: list[int] = []
    yield lambda pid: pids.append(pid) or pid
    for pid in pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_output_and_exit_code_of_a_program() -> None:
    process = run_program(
        [*PYTHON, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"], check=False
    )
    assert (process.output, process.errors, process.returncode) == ("out\n", "err\n", 3)
    assert process.lines == ["err"]


def test_program_that_fails_is_reported_with_its_words() -> None:
    with pytest.raises(ProcessFailed, match=r"(?s)exit code 3.*last words"):
        run_program([*PYTHON, "import sys; print('last words', file=sys.stderr); sys.exit(3)"])


def test_program_that_does_not_exist_is_reported() -> None:
    with pytest.raises(ProcessFailed, match=r"(?s)exit code 127.*/nonexistent/none-such: No such file"):
        run_program(["/nonexistent/none-such"])


def test_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(ProcessFailed, match=r"still runs after 0\.05 s"):
        run_program([*PYTHON, "import signal; signal.pause()"], timeout=0.05)


def test_large_output_does_not_block() -> None:
    process = run_program([*PYTHON, "print('x' * 1_000_000)"])
    assert len(process.output) == 1_000_001


def test_pid_is_the_programs_own() -> None:
    process = run_program([*PYTHON, "import os; print(os.getpid())"])
    assert process.output.strip() == str(process.pid)


def test_environment_and_directory_are_given(tmp_path: Path) -> None:
    code = "import os; print(os.environ['GIVEN'], os.getcwd(), 'PATH' in os.environ)"
    process = run_program([*PYTHON, code], env={"GIVEN": "value"}, directory=tmp_path)
    assert process.output.split() == ["value", str(tmp_path), "True"]


def test_standard_input_is_empty() -> None:
    assert run_program([*PYTHON, "import sys; print(repr(sys.stdin.read()))"]).output == "''\n"


def test_wait_for_finds_lines_of_both_outputs_also_earlier_ones() -> None:
    code = "import sys, signal; print('one', flush=True); print('two', file=sys.stderr, flush=True); signal.pause()"
    with Process([*PYTHON, code]) as process:
        assert process.wait_for("tw") == "two"
        assert process.wait_for("one") == "one"
        assert process.wait_for(lambda line: line.startswith("t")) == "two"
        with pytest.raises(ProcessFailed, match=r"did not print three within 0\.01 s"):
            process.wait_for("three", timeout=0.01)


def test_wait_ready_waits_for_the_record() -> None:
    code = """
import signal, sys
sys.stderr.write('{"level":"info","msg":"not yet"}\\n{"level":"info","msg":"ready","pid":1}\\n{broken\\n')
sys.stderr.flush()
signal.pause()
"""
    with Process([*PYTHON, code]) as process:
        process.wait_ready()
        process.wait_for("broken")
        assert [record["msg"] for record in process.records] == ["not yet", "ready"]


def test_wait_ready_reports_an_early_end() -> None:
    with Process([*PYTHON, "raise SystemExit('no such port')"]) as process:
        with pytest.raises(ProcessFailed, match=r"(?s)ended without .*exit code 1.*no such port"):
            process.wait_ready()


def test_lines_are_passed_on_as_they_come() -> None:
    lines: list[str] = []
    code = "import sys; sys.stderr.write('a\\nb\\nunfinished')"
    with Process([*PYTHON, code], on_line=lines.append) as process:
        process.wait()
    assert lines == ["a", "b", "unfinished"]


def test_stop_terminates_and_returns_the_code() -> None:
    code = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print('set', flush=True)
signal.pause()
"""
    with Process([*PYTHON, code]) as process:
        process.wait_for("set")
        assert process.stop() == 7
        assert process.stop() == 7


def test_stop_kills_what_does_not_listen() -> None:
    code = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('set', flush=True)
while True: signal.pause()
"""
    with Process([*PYTHON, code]) as process:
        process.wait_for("set")
        assert process.stop(0.05) == -signal.SIGKILL


def test_stop_lets_descendants_end_and_kills_the_rest(
    monkeypatch: pytest.MonkeyPatch, doomed: Callable[[int], int]
) -> None:
    monkeypatch.setattr("gostnet.testing.processes._GROUP_GRACE", 0.2)
    code = """
import subprocess, sys, signal
child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import signal\\nwhile True: signal.pause()'])
print(child.pid, flush=True)
signal.pause()
"""
    with Process([*PYTHON, code]) as process:
        child = doomed(int(process.wait_for(lambda line: line.strip().isdigit())))
        process.stop()
    assert await_end(child)


def test_kill_leaves_descendants_alone(doomed: Callable[[int], int]) -> None:
    code = """
import subprocess, sys, signal
child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import signal\\nwhile True: signal.pause()'])
print(child.pid, flush=True)
signal.pause()
"""
    with Process([*PYTHON, code]) as process:
        child = doomed(int(process.wait_for(lambda line: line.strip().isdigit())))
        assert process.kill() == -signal.SIGKILL
        assert alive(child)
        os.kill(child, signal.SIGKILL)


def test_program_dies_with_a_parent_that_is_killed(doomed: Callable[[int], int]) -> None:
    code = f"""
import signal, sys
sys.path[:0] = {sys.path!r}
from gostnet.testing.processes import Process
process = Process([sys.executable, '-I', '-S', '-c', 'import signal; print("up", flush=True); signal.pause()'])
process.start()
process.wait_for("up")
print(process.pid, flush=True)
signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        child = doomed(int(parent.stdout.readline()))
        assert alive(child)
        parent.kill()
    assert await_end(child)


def test_process_is_used_once() -> None:
    process = Process([*PYTHON, "pass"])
    assert process.stop() == 0
    with pytest.raises(RuntimeError, match="has not been started"):
        process.wait()
    with pytest.raises(RuntimeError, match="has not been started"):
        _ = process.pid
    with process:
        process.wait()
        with pytest.raises(RuntimeError, match="has been started before"):
            process.start()


def test_gostnet_is_the_one_of_this_installation() -> None:
    process = gostnet("-V")
    with process:
        assert process.wait() == 0
    assert process.output.startswith("gostnet ")
