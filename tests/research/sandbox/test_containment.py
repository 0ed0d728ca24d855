"""What a program tries to do to the system, from inside, fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from research.sandbox import runner
from research.sandbox.runner import Limits, Sandbox
from yunmin.errors import SandboxError

# each way's outcome: the exception it ended with, or "done"
PROGRAM = """
def outcome(way):
    try:
        exec(way, {})
    except BaseException as error:
        return type(error).__name__
    return "done"
"""
FLOOD = """import os
while True:
    for number in range(3, 64):
        try: os.write(number, b"x")
        except OSError: pass
"""
SYSTEM_CALL = (
    "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nif libc.syscall(%s) == -1: raise PermissionError"
)

NETWORK = {
    "TCP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "IPv6": "import socket; socket.socket(socket.AF_INET6, socket.SOCK_STREAM)",
    "unix": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "raw": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "pair": "import socket; socket.socketpair()",
    "HTTP": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
    "name": "import socket; socket.getaddrinfo('localhost', 80)",
    "io_uring": SYSTEM_CALL % "425, 8, ctypes.create_string_buffer(120)",
}
PROCESSES = {
    "fork": "import os; os.fork() or os._exit(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "vfork": SYSTEM_CALL % "58",
    "clone3": SYSTEM_CALL % "435, ctypes.create_string_buffer(88), 88",
    "thread": "import threading; threading.Thread(target=print).start()",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {{}})",
    "shell": "import os, subprocess; subprocess.run('true', shell=True, check=True)",
    "pool": "import concurrent.futures as f; f.ProcessPoolExecutor(1).submit(int).result()",
    "daemon": "import os\nif os.fork() == 0: os.setsid(); os.fork() or open('{folder}/daemon', 'w')",
    "kill": "import os; os.kill({pid}, 15)",
    "kill all": "import os; os.kill(-1, 9)",
    "signal of a pipe": "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, {pid})",
    "ptrace": SYSTEM_CALL % "101, 16, {pid}, 0, 0",
    "memory of another": "open('/proc/{pid}/mem', 'rb')",
    "priority": "import os; os.nice(-5)",
    "affinity": "import os; os.sched_setaffinity({pid}, {{0}})",
    "limits": "import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "user": "import os; os.setuid(65534)",
    "namespace": SYSTEM_CALL % "272, 0x10000000",
}
READING = {
    "passwords": "open('/etc/passwd').read()",
    "home": "import os; os.listdir('{home}')",
    "a secret": "open('{folder}/secret').read()",
    "a folder": "import os; os.listdir('{folder}')",
    "root": "import os; os.listdir('/')",
    "environment of another": "open('/proc/{pid}/environ').read()",
    "its own": "open('/proc/self/environ').read()",
    "its sandbox": "open('{here}').read()",
    "a package": "open('{package}').read()",
    "by a link": "import os; os.symlink('{folder}/secret', 'link'); open('link').read()",
    "device": "open('/dev/zero', 'rb').read(1)",
}
WRITING = {
    "a new file": "open('{folder}/new', 'w').write('x')",
    "a file": "open('{folder}/secret', 'a').write('x')",
    "temporary files without end": "import tempfile\nkept = []\nwhile True: kept.append(tempfile.TemporaryFile())",
    "the working folder": "open('new', 'w')",
    "shared memory": "open('/dev/shm/new', 'w')",
    "anonymous memory": "import os; os.memfd_create('x')",
    "a pipe": "import os; os.mkfifo('{folder}/new')",
    "a folder": "import os; os.mkdir('{folder}/new')",
    "rename": "import os; os.rename('{folder}/secret', '{folder}/new')",
    "link": "import os; os.link('{folder}/secret', '{folder}/new')",
    "symbolic link": "import os; os.symlink('{folder}/secret', '{folder}/new')",
    "remove": "import os; os.unlink('{folder}/secret')",
    "cut": "import os; os.truncate('{folder}/secret', 0)",
    "mode": "import os; os.chmod('{folder}/secret', 0o777)",
    "owner": "import os; os.chown('{folder}/secret', 1, 1)",
    "times": "import os; os.utime('{folder}/secret', (1, 1))",
    "attribute": "import os; os.setxattr('{folder}/secret', 'user.x', b'x')",
    "mount": SYSTEM_CALL % "165, b'x', b'/tmp', b'tmpfs', 0, 0",
}

_PACKAGES = Path(sysconfig.get_path("stdlib"), "site-packages")


def ways_that_work(sandbox: Sandbox, ways: dict[str, str], expected: str) -> str:
    """Those of the ways whose outcome is not among the expected ones."""
    tests = f"""def check(outcome):
    found = {{name: outcome(way) for name, way in {ways!r}.items()}}
    assert not (bad := {{name: end for name, end in found.items() if end not in {expected.split()!r}}}), bad"""
    return sandbox.judge(PROGRAM, "outcome", tests).detail


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        (NETWORK, "PermissionError URLError gaierror"),
        (PROCESSES, "PermissionError RuntimeError"),
        (READING, "PermissionError"),
        (WRITING, "PermissionError FileNotFoundError"),
    ],
    ids=["network", "processes", "reading", "writing"],
)
def test_every_way_out_is_closed(
    sandbox: Sandbox, tmp_path: Path, ways: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = secret.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = {
            "folder": tmp_path,
            "port": server.getsockname()[1],
            "pid": os.getpid(),
            "home": Path.home(),
            "here": runner.__file__,
            "package": next((path for path in _PACKAGES.rglob("*.*") if path.is_file()), secret),
        }
        detail = ways_that_work(sandbox, {name: way.format(**facts) for name, way in ways.items()}, expected)
    assert detail == ""
    assert list(tmp_path.iterdir()) == [secret]
    assert secret.stat() == before
    assert secret.read_text() == "secret"


def test_nothing_is_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    program = """import os, sys
def state():
    descriptors = []
    for number in range(3, 1024):
        try:
            descriptors.append(os.fstat(number).st_mode & 0o170000 == 0o010000)
        except OSError:
            pass
    return sorted(os.environ), descriptors, sys.stdin.read() if sys.stdin else "", sys.argv[1:], os.getcwd()
"""
    tests = """def check(state):
    names, pipes, read, arguments, folder = state()
    assert set(names) <= {"LANG", "LC_CTYPE", "PYTHONHASHSEED", "TZ"}, names
    assert pipes == [True, True], pipes
    assert (read, arguments, folder) == ("", [], "/")"""
    assert sandbox.judge(program, "state", tests).detail == ""


def test_memory_ends(sandbox: Sandbox) -> None:
    del sandbox  # it has shown that programs can be confined; less memory is sooner full
    ways = {
        "at once": "bytearray(2 << 30)",
        "in pieces": "[bytearray(1 << 20) for _ in range(10**9)]",
        "a text": "'x' * (1 << 34)",
        "a mapping": "import mmap; mmap.mmap(-1, 1 << 30)",
    }
    assert ways_that_work(Sandbox(Limits(memory_bytes=1 << 28)), ways, "MemoryError OSError") == ""


def test_python_s_library_is_there(sandbox: Sandbox) -> None:
    modules = "collections dataclasses datetime decimal fractions functools hashlib heapq itertools json math random"
    program = (
        f"def load():\n    import {', '.join(modules.split())}, re, statistics, string, typing, zlib\n    return 1\n"
    )
    assert sandbox.judge(program, "load", "assert load() == 1").detail == ""


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        (
            "import signal\nfor n in (2, 3, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
            Limits(cpu_s=1),
        ),
        ("def f():\n    import time\n    time.sleep(60)", Limits(wall_s=0.7)),
        ("def f():\n    while True: print('x' * 10**6)", Limits(wall_s=0.7)),
        (FLOOD, Limits(wall_s=0.7)),
    ],
    ids=["deaf to signals", "asleep", "prints without end", "fills pipes"],
)
def test_time_ends_and_nothing_is_left_running(sandbox: Sandbox, program: str, limits: Limits) -> None:
    del sandbox  # it has shown that programs can be confined
    begin = time.monotonic()
    verdict = Sandbox(limits).judge(program, "f", "f()")
    assert not verdict.passed
    assert time.monotonic() - begin < 50
    assert not _confined_processes(psutil.Process())


def test_programs_die_with_the_process_that_judges_them(sandbox: Sandbox) -> None:
    del sandbox
    script = (
        "from research.sandbox.runner import Limits, Sandbox\n"
        "Sandbox(Limits(wall_s=600)).judge('import time\\nwhile True: time.sleep(1)', 'f', 'f()')\n"
    )
    judge = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 30
        confined: list[psutil.Process] = []
        while len(confined) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
            confined = _confined_processes(psutil.Process(judge.pid))
        assert len(confined) == 2
    finally:
        judge.send_signal(signal.SIGKILL)
        judge.wait()
    _, alive = psutil.wait_procs(confined, timeout=10)
    assert not alive


def test_elsewhere_than_on_linux_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match=r"only on Linux.*darwin"):
        Sandbox()


@pytest.mark.parametrize(
    ("without", "found"),
    [
        ("confine._filter_system_calls = lambda libc: None", "open sockets, start processes, reach other processes"),
        ("confine._allow_reading = lambda libc, folders: None", "read files"),
        ("confine._limit = lambda cpu_s, memory_bytes: None", "allocate without limit"),
        ("import os; os.environ['SECRET_TOKEN'] = 'x'", "see variables of the environment"),
        ("import os; os.dup2(0, 40)", "use files it inherits"),
        ("confine._LANDLOCK_CREATE_RULESET = 10**6", "it lacks Landlock"),
        ("confine.filter_program = lambda machine: None", "it lacks a list of system calls for"),
        ("import os; os._exit(0)", "did not report"),
    ],
)
def test_a_system_without_a_layer_is_refused_by_name(
    sandbox: Sandbox, without: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    del sandbox
    start = runner._PYTHON[-1].replace("child.main()", f"from research.sandbox import confine; {without}; child.main()")
    monkeypatch.setattr(runner, "_PYTHON", (*runner._PYTHON[:-1], start))
    with pytest.raises(SandboxError, match=found):
        Sandbox(Limits(memory_bytes=1 << 28))


def _confined_processes(ancestor: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in ancestor.children(recursive=True):
        try:
            if runner._START in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
