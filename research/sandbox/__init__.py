"""Runs programs that a model wrote: on Linux, without network, files, further processes or a voice in the verdict.

A program and the tests that judge it are two processes. The first has the program, the second the tests, and between
them go arguments, results and exceptions as plain data. So a program cannot report its own success, change what the
tests mean, read what they expect, or answer with an object that equals everything: it can only return values.

Both processes are confined in the same way before a line of foreign code runs. Nothing needs root or a namespace, so it
works in containers, too. What rests on what:

| guarantee | rests on |
|---|---|
| no network, no sockets of any kind | seccomp: a short list of allowed system calls, which has none for sockets |
| one process of one thread, and nothing stays behind | seccomp: no clone, fork or exec; SIGKILL at the end |
| no signal to and no look into other processes | seccomp: no kill, ptrace or the like; fcntl without F_SETOWN |
| reads Python's library and the system's (/lib, /usr/lib), but no installed package of Python's | Landlock |
| writes, makes, changes and removes no file | seccomp: no call for it, no opening to write; also Landlock |
| limited time | a limit on processor time, SIGKILL by the parent after some more, SIGKILL if the parent dies |
| limited memory | a limit on address space: with one process, that is all there is |
| no secrets | an environment of three fixed variables, no open file but the pipes of its own |
| no privileges, for root either | no_new_privs, no capabilities |

What it does not hide: whether a file whose path the program knows exists, its size, and where it leads if it is a
link; the names of installed packages; the system's name, version and uptime. It is no protection against errors of the
kernel itself.

`Sandbox()` tries to break each guarantee in a confined process of its own before it runs anything, and raises an error
that names what is missing, for example on macOS, on Windows, or on a kernel without Landlock (Linux 5.13).
"""
