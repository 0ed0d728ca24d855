"""The list of system calls, read as the kernel reads it."""

from __future__ import annotations

import os

import pytest

from research.sandbox.runner import Sandbox
from research.sandbox.syscalls import filter_program

ALLOWED, REFUSED, KILLED = 0x7FFF0000, 0x00050001, 0x80000000
X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003


def decision(machine: str, architecture: int, number: int, *arguments: int) -> int:
    """What the filter returns for a call, by the four instructions that it has."""
    program = filter_program(machine)
    assert program is not None
    data = {0: number, 4: architecture} | {16 + 8 * i: value for i, value in enumerate(arguments)}
    at, loaded = 0, 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        match code:
            case 0x20:
                loaded = data.get(operand, 0)
            case 0x15:
                at += yes if loaded == operand else no
            case 0x45:
                at += yes if loaded & operand else no
            case 0x06:
                return operand


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (0, (), ALLOWED),  # read
        (257, (-100, 0, os.O_RDONLY | os.O_CLOEXEC), ALLOWED),  # openat
        (257, (-100, 0, os.O_WRONLY), REFUSED),
        (257, (-100, 0, os.O_RDWR), REFUSED),
        (257, (-100, 0, os.O_RDONLY | os.O_CREAT), REFUSED),
        (257, (-100, 0, os.O_RDONLY | os.O_TRUNC), REFUSED),
        (2, (0, os.O_RDONLY), ALLOWED),  # open
        (2, (0, os.O_WRONLY), REFUSED),
        (72, (0, 1), ALLOWED),  # fcntl, F_GETFD
        (72, (0, 1030), ALLOWED),  # F_DUPFD_CLOEXEC
        (72, (0, 8), REFUSED),  # F_SETOWN
        (72, (0, 10), REFUSED),  # F_SETSIG
        (41, (), REFUSED),  # socket
        (56, (), REFUSED),  # clone
        (59, (), REFUSED),  # execve
        (101, (), REFUSED),  # ptrace
        (437, (), REFUSED),  # openat2
        (9999, (), REFUSED),
        (0x40000000, (), REFUSED),  # read, by the numbers of x32
        (0x40000101, (-100, 0, os.O_RDONLY), REFUSED),
    ],
)
def test_calls_of_x86_64(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert decision("x86_64", X86_64, number, *arguments) == expected


@pytest.mark.parametrize(
    ("number", "arguments", "expected"),
    [
        (63, (), ALLOWED),  # read
        (56, (-100, 0, os.O_RDONLY), ALLOWED),  # openat
        (56, (-100, 0, os.O_WRONLY), REFUSED),
        (25, (0, 8), REFUSED),  # fcntl, F_SETOWN
        (198, (), REFUSED),  # socket
        (220, (), REFUSED),  # clone
        (221, (), REFUSED),  # execve
        (129, (), REFUSED),  # kill
        (2, (), REFUSED),  # a number of x86_64 only
    ],
)
def test_calls_of_aarch64(number: int, arguments: tuple[int, ...], expected: int) -> None:
    assert decision("aarch64", AARCH64, number, *arguments) == expected


def test_calls_in_another_architecture_s_manner_end_the_process() -> None:
    assert decision("x86_64", I386, 3) == KILLED
    assert decision("aarch64", X86_64, 63) == KILLED


def test_an_architecture_without_a_list_has_no_filter() -> None:
    assert filter_program("riscv64") is None


def test_the_kernel_refuses_every_call_that_is_not_listed(sandbox: Sandbox) -> None:
    machine = os.uname().machine
    architecture = {"x86_64": X86_64, "aarch64": AARCH64}[machine]
    numbers = [*range(600), *(0x40000000 + n for n in range(600))]
    # no filter is asked about uretprobe and uprobe, which kernels have for their own debuggers: who calls them dies
    numbers = [number for number in numbers if number not in (335, 336)]
    refused = [number for number in numbers if decision(machine, architecture, number) == REFUSED]
    program = """import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
def answer(number):
    return libc.syscall(number, 0, 0, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()]
"""
    tests = f"for n in {refused}: assert answer(n) == (-1, 'EPERM'), n"
    assert len(refused) > 1000
    assert sandbox.judge(program, "answer", tests).detail == ""
