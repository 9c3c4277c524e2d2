"""The child of sandbox.py: limits itself, in ways that cannot be taken back, then runs the program
on its standard input.

Resource limits (CPU time, memory, size of files), Landlock (it can write below its own directory
only) and a seccomp filter (no sockets, no processes, no signals to others, no tracing). Runs as a
script, without this package: python -I sandboxed.py HOME FD SECONDS MEMORY FILE. To FD go CONTAINED
when all limits hold, and, when the program has run to its end, the nonce that stood in front of it.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

CONTAINED = "contained:"
NONCE = 32  # characters
# What the filter refuses, by system call number.
_REFUSED: dict[str, Any] = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "clone3": 435,
        # socket, connect, bind, sendto, sendmsg, accept, listen, socketpair, accept4, sendmmsg;
        # fork, vfork, execve, execveat; kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo,
        # ptrace, process_vm_readv, process_vm_writev, pidfd_send_signal, pidfd_open, pidfd_getfd;
        # mount, umount2, unshare, setns, pivot_root, chroot; io_uring_*; keyctl, bpf,
        # perf_event_open, userfaultfd, init_module, finit_module, reboot; setuid, setgid and their
        # relatives
        "calls": (
            *(
                41,
                42,
                49,
                44,
                46,
                43,
                50,
                53,
                288,
                307,
                57,
                58,
                59,
                322,
                62,
                200,
                234,
                129,
                297,
                101,
                310,
                311,
                424,
                434,
                438,
            ),
            *(
                165,
                166,
                272,
                308,
                155,
                161,
                425,
                426,
                427,
                250,
                321,
                298,
                323,
                175,
                313,
                169,
                105,
                106,
                113,
                114,
                117,
                119,
            ),
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "clone3": 435,
        "calls": (
            *(
                198,
                203,
                200,
                206,
                211,
                202,
                201,
                199,
                242,
                269,
                221,
                281,
                129,
                130,
                131,
                138,
                240,
                117,
                270,
                271,
                424,
                434,
                438,
            ),
            *(
                40,
                39,
                97,
                268,
                41,
                51,
                425,
                426,
                427,
                219,
                280,
                241,
                282,
                105,
                273,
                142,
                146,
                144,
                145,
                143,
                147,
                149,
            ),
        ),
    },
}
_CLONE_THREAD = 0x10000
_NO_NEW_PRIVS, _SECCOMP = 38, 22
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# write, remove, make and truncate, by the version of Landlock's interface
_WRITES = {1: 0x1FF2, 2: 0x3FF2, 3: 0x7FF2}


def _check(result: int, what: str) -> int:
    if result < 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _contain(home: str, seconds: int, memory: int, file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # The soft CPU limit's signal ends the process; a handler cannot outlive the hard one.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _check(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")

    version = _check(
        libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1),
        "Landlock (Linux 5.13 or newer, enabled)",
    )
    rights = _WRITES[min(version, max(_WRITES))]
    attributes = struct.pack("Q", rights)
    rules = _check(
        libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    for path, allowed in ((home, rights), ("/dev/null", rights & 0x4002)):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _check(
            libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, fd), 0),
            "landlock_add_rule",
        )
        os.close(fd)
    _check(libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)
    _filter(libc)


def _filter(libc: ctypes.CDLL) -> None:
    """A classic BPF program over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}."""
    machine = _REFUSED[platform.machine()]
    load, equal, bits, give, at_least = 0x20, 0x15, 0x45, 0x06, 0x35
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
    code: list[tuple[int, int, int, int]] = [
        # Another architecture's numbers
        (load, 0, 0, 4), (equal, 1, 0, machine["audit"]), (give, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),  # x32
        # Its flags cannot be seen; libc then uses clone
        (equal, 0, 1, machine["clone3"]), (give, 0, 0, missing),
        (equal, 0, 4, machine["clone"]), (load, 0, 0, 16), (bits, 0, 1, _CLONE_THREAD), (give, 0, 0, allow), (give, 0, 0, refuse),
    ]  # fmt: skip
    for call in machine["calls"]:
        code += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    code.append((give, 0, 0, allow))
    packed = ctypes.create_string_buffer(
        b"".join(struct.pack("HBBI", op, yes, no, k) for op, yes, no, k in code)
    )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code), ctypes.cast(packed, ctypes.c_void_p).value)
    _check(libc.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def _child(home: str, writer: str, *limits: str) -> None:
    given = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    nonce, program = given[:NONCE], given[NONCE:]
    _contain(home, *map(int, limits))
    os.write(int(writer), CONTAINED.encode())
    names = {"__name__": "__main__"}
    exec(compile(program, "program.py", "exec"), names)
    os.write(int(writer), nonce.encode())


if __name__ == "__main__":
    _child(*sys.argv[1:])
