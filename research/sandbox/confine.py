"""What a process gives up before it runs foreign code; each step cannot be undone."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from research.sandbox.syscalls import filter_program

# linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
# linux/landlock.h; its system calls have the same numbers on all architectures
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _RULE_PATH_BENEATH = 1, 1
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_RIGHTS_OF_VERSION = (13, 14, 15, 15, 16)  # how many rights over files versions 1, 2, ... can take away
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_PACKAGES = ("site-packages", "dist-packages")  # what anyone may have installed, such as solutions of problems
_OPEN_FILES = 64


class MissingLayerError(Exception):
    """The system does not have a layer that the sandbox rests on; the message names it."""


def confine(parent: int, cpu_s: int, memory_bytes: int) -> None:
    """Confines this process for good. It must have one thread.

    Args:
        parent: id of the process with which this one shall die.
        cpu_s: seconds of processor time until it is killed.
        memory_bytes: largest address space.

    Raises:
        MissingLayerError: a layer is not to be had; some of the others may be in place.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, "a signal at the parent's death", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above
    _prctl(libc, "no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)
    _allow_reading(libc, [*sys.path, *_LIBRARIES, f"{sys.base_prefix}/lib"])
    _limit(cpu_s, memory_bytes)
    _drop_capabilities(libc)
    _filter_system_calls(libc)


def _prctl(libc: ctypes.CDLL, what: str, option: int, value: int) -> None:
    if libc.prctl(option, *(ctypes.c_ulong(argument) for argument in (value, 0, 0, 0))) != 0:
        raise _missing(what)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _allow_reading(libc: ctypes.CDLL, folders: Iterable[str]) -> None:
    """Takes away all access to files but reading below these folders, installed packages left out.

    A path that is not there is passed over. Names of files can be listed there all the same: a rule holds for all that
    is below a folder, and an import lists Python's.
    """
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < 1:
        raise _missing("Landlock (Linux 5.13, switched on)")
    rights = _RIGHTS_OF_VERSION[min(version, len(_RIGHTS_OF_VERSION)) - 1]
    handled = ctypes.c_uint64((1 << rights) - 1)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise _missing("a Landlock ruleset")
    for folder in dict.fromkeys(str(Path(path).resolve()) for path in folders if Path(path).is_dir()):
        _allow(libc, ruleset, folder, _READ_FOLDER)
        for path, is_folder in _without_packages(folder):
            _allow(libc, ruleset, path, _READ_FILE | (_READ_FOLDER if is_folder else 0))
    if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise _missing("Landlock for this process")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone by now; what has no rule cannot be read
        return
    rule = _PathBeneath(rights, place)
    if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0) != 0:
        raise _missing(f"a Landlock rule for {path}")
    os.close(place)


def _without_packages(folder: str) -> Iterator[tuple[str, bool]]:
    """Paths of a folder whose whole content may be read, and whether each is a folder.

    Links are left out: what counts is whether the file that they lead to may be read.
    """
    for entry in os.scandir(folder):
        if entry.is_symlink() or entry.name in _PACKAGES:
            continue
        if entry.name.startswith("python") and entry.is_dir():
            yield from _without_packages(entry.path)
        else:
            yield entry.path, entry.is_dir()


def _limit(cpu_s: int, memory_bytes: int) -> None:
    wanted = {
        resource.RLIMIT_CPU: cpu_s,  # soft as hard, so that it is SIGKILL and not a signal to catch
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in wanted.items():
        allowed = resource.getrlimit(limit)[1]
        value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
        resource.setrlimit(limit, (value, value))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none) != 0:
        raise _missing("giving up capabilities")


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def _filter_system_calls(libc: ctypes.CDLL) -> None:
    machine = os.uname().machine
    instructions = filter_program(machine)
    if instructions is None:
        raise MissingLayerError(f"a list of system calls for {machine}")
    array = (_Instruction * len(instructions))(*(_Instruction(*each) for each in instructions))
    program = _Program(len(instructions), array)
    # prctl's third argument is the program's address
    address = ctypes.addressof(program)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.c_ulong(address)) != 0:
        raise _missing("seccomp filters")


def _missing(what: str) -> MissingLayerError:
    return MissingLayerError(f"{what} ({os.strerror(ctypes.get_errno())})")
