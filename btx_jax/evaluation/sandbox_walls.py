"""Containment of a process that runs a model's code: namespaces, another user, no capabilities,
resource limits, Landlock and an allow-list of system calls (Linux 5.13 or newer, x86-64 and
AArch64). Standard library only: sandboxed.py imports it in a bare interpreter.

The walls are independent, so that another one holds where an old kernel lacks one. The process
cannot undo any of them.
"""

import ctypes
import os
import resource
import struct
import sys

NAME_SPACES, OTHER_USER = "name spaces", "another user"  # walls that not every machine supports

# Permitted system calls: numbers on x86-64 and AArch64 (None: does not exist).
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # Files: Landlock decides about paths
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436),
    "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, None), "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441),
    "eventfd2": (290, 19), "sendfile": (40, 71), "copy_file_range": (326, 285), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "fadvise64": (221, 223), "stat": (4, None),
    "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "statfs": (137, 43), "fstatfs": (138, 44), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "getdents64": (217, 61), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276),
    # Its own memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216),
    "madvise": (28, 233), "brk": (12, 214),
    # Its own threads, signals to itself, clocks
    "futex": (202, 98), "futex_waitv": (449, 449), "membarrier": (324, 283), "rseq": (334, 293),
    "set_robust_list": (273, 99), "set_tid_address": (218, 96), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "gettid": (186, 178), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "pause": (34, None), "restart_syscall": (219, 128), "alarm": (37, None),
    "setitimer": (38, 103), "getitimer": (36, 102), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95),
    # Identity and environment
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150),
    "getgroups": (115, 158), "getpgrp": (111, None), "getpgid": (121, 155), "getsid": (124, 156),
    "uname": (63, 160), "sysinfo": (99, 179), "getcpu": (309, 168), "getrlimit": (97, 163),
    "getrandom": (318, 278),
}  # fmt: skip
# Permitted only for some values of one argument. Below: the numbers of the system calls, the index
# of the argument, and its permitted values.
_FCNTL, _IOCTL, _CLONE = (72, 25), (16, 29), (56, 220)
_OPENS = (((2, None), 1), ((257, 56), 2))
_MKDIRS = (((83, None), 1), ((258, 34), 2))
_SELF = ((62, 129), (234, 131))  # kill, tgkill
_PRLIMIT = (302, 261)
_MISSING = (
    435,
    437,
)  # clone3, openat2 take pointers; libc falls back to clone, openat
_DESCRIPTORS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_SETFL, _ASYNC = 4, 0x2000
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_TERMINALS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_CLONE_THREAD, _CLONE_NEW = 0x10000, 0x7E020080
_ACCESS, _TRUNC = 0x3, 0x200

# Linux constants that Python does not define.
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PDEATHSIG, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 22, 24, 38, 47
_NEW_MOUNTS, _NEW_USER, NEW_PIDS = 0x20000, 0x10000000, 0x20000000
_NEW_OTHERS = 0x02000000 | 0x04000000 | 0x08000000 | 0x40000000  # cgroups, host name, IPC, network
_MS_BIND, _MS_REC, _MS_PRIVATE, _NOSUID_NODEV, _MNT_DETACH = 0x1000, 0x4000, 0x40000, 6, 2
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
# Landlock: rights by ABI version; rights granted.
_HANDLED = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_READ_FILE, _READ, _OWN = 0x4, 0xC, 0x61BE  # own: also write, remove, create
_NULL = 0x4006  # read, write, truncate

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine cannot set up a wall; the message says which, and why."""


def _check(result: int, what: str) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def readable(packages: list[str]) -> list[str]:
    """Directories and files that a Python program needs: standard library, packages, shared
    libraries, time zones. None is inside another."""
    standard = {os.path.dirname(os.__file__), f"{sys.base_prefix}/lib"}
    system = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"}
    others = {"/gnu/store", "/usr/share/zoneinfo", "/etc/ld.so.cache"}
    found: list[str] = []
    for path in sorted(map(os.path.normpath, {*packages} | standard | system | others)):
        inside = any(path.startswith(f"{outer}/") for outer in found)
        if not inside and os.path.exists(path):
            found.append(path)
    return found


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    _check(_libc.prctl(_PDEATHSIG, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "name spaces")


def enter_name_spaces(home: str, paths: list[str], size: int, files: int) -> str:
    """Enter new namespaces for network, host name and IPC, and a new file tree. The tree contains
    `paths`, read-only, and a new `home` in memory that holds at most `size` bytes and `files`
    files. Returns the new home. Ordinary users get a user namespace as well."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        unshare(_NEW_MOUNTS | _NEW_OTHERS)
    else:
        unshare(_NEW_USER | _NEW_MOUNTS | _NEW_OTHERS)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", home, "tmpfs", _NOSUID_NODEV, "size=1m,mode=755")
    for path in (*paths, "/dev/null", "/dev/urandom"):
        target = f"{home}{path}"
        os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
        if not os.path.isdir(path):
            os.mknod(target)
        _mount(path, target, None, _MS_BIND | _MS_REC)
        attributes = struct.pack("4Q", 3 if path.startswith("/dev/") else 7, 0, 0, 0)
        _check(
            _libc.syscall(
                _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes,
                ctypes.c_size_t(len(attributes)),
            ),
            "mount_setattr",
        )  # fmt: skip
    os.chdir(home)
    os.mkdir("old")
    os.mkdir("sandbox")
    quota = f"size={size},nr_inodes={files + 1},mode=755"
    _mount("tmpfs", f"{home}/sandbox", "tmpfs", _NOSUID_NODEV, quota)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    _check(_libc.umount2(b"/old", _MNT_DETACH), "umount2")
    return "/sandbox"


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = (os.fsencode(name) if name else None for name in (source, target, kind))
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def other_user() -> int:
    """A user id that no other sandbox uses; 65534 (nobody) where root may not choose freely."""
    with open("/proc/self/uid_map") as file:
        first, _, count = file.read().split()[:3]
    alone = 0x70000000 + os.getpid()
    return alone if int(first) + int(count) > alone else 65534


def become(user: int) -> None:
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError as error:
        raise Refused(f"another user: {error.strerror}") from error


def contain(home: str, paths: list[str], seconds: int, memory: int, file: int) -> None:
    """Remove this process's ability to harm others. From then on it can compute, read `paths`, and
    write below `home`."""
    os.umask(0o077)
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),  # soft and hard: SIGKILL, which cannot be handled
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    _drop_capabilities()
    die_with_parent()  # must follow the change of user, which undoes it
    _check(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _landlock(home, paths)
    _seccomp(system_calls(os.uname().machine, os.getpid()))


def _drop_capabilities() -> None:
    _libc.prctl(_CAP_AMBIENT, 4, 0, 0, 0)
    capability = 0
    while (
        _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) == 0
    ):  # nothing to drop without privileges
        capability += 1
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.syscall(_CAPSET[os.uname().machine], header, none), "capset")


def _landlock(home: str, paths: list[str]) -> None:
    version = _check(
        _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1),
        "Landlock (Linux 5.13 or newer, enabled)",
    )
    handled = _HANDLED[min(version, max(_HANDLED))]
    attributes = struct.pack("Q", handled)
    if version >= 4:
        attributes += struct.pack("Q", 0x3)  # TCP: bind, connect
    if version >= 6:
        attributes += struct.pack("Q", 0x3)  # abstract sockets and signals stay inside
    rules = _check(
        _libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    granted = {path: _READ if os.path.isdir(path) else _READ_FILE for path in paths}
    granted |= {home: _OWN, "/dev/null": _NULL, "/dev/urandom": _READ_FILE}
    for path, rights in granted.items():
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights & handled, fd)
        _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "landlock_add_rule")
        os.close(fd)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


_LOAD, _EQUAL, _BITS, _GIVE, _AT_LEAST, _AND = 0x20, 0x15, 0x45, 0x06, 0x35, 0x54
ALLOW, REFUSE, MISSING, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000  # EPERM, ENOSYS
Code = list[tuple[int, int, int, int]]


def system_calls(machine: str, pid: int) -> Code:
    """The filter, a classic BPF program over struct seccomp_data {int nr; u32 arch; u64 ip; u64
    args[6]}, as (operation, jump if true, jump if false, operand). Everything not listed is
    refused. `pid` is the only process that may be signalled."""
    column = ("x86_64", "aarch64").index(machine)
    code: Code = [
        # Kill for the numbers of other architectures and of x32.
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, (0xC000003E, 0xC00000B7)[column]), (_GIVE, 0, 0, KILL),
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, 0x40000000), (_GIVE, 0, 0, KILL),
    ]  # fmt: skip

    def when(numbers: tuple[int | None, int | None], argument: int, then: Code) -> None:
        """Check one argument of one system call."""
        number = numbers[column]
        if number is not None:
            then = [(_LOAD, 0, 0, 16 + 8 * argument), *then, (_GIVE, 0, 0, REFUSE)]
            code.extend([(_EQUAL, 0, len(then), number), *then])

    def among(values: tuple[int, ...]) -> Code:
        return [step for v in values for step in ((_EQUAL, 0, 1, v), (_GIVE, 0, 0, ALLOW))]

    def unless(bits: int) -> Code:
        return [(_BITS, 1, 0, bits), (_GIVE, 0, 0, ALLOW)]

    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            code += among((number,))
    code += [
        step for v in _MISSING for step in ((_EQUAL, 0, 1, v), (_GIVE, 0, 0, MISSING))
    ]  # fmt: skip
    for numbers in _SELF:
        when(numbers, 0, among((pid,)))
    when(_PRLIMIT, 0, among((0, pid)))
    when(_IOCTL, 1, among(_TERMINALS))
    # Further checks of calls that depend on more than one argument.
    for numbers, argument in _OPENS:  # O_RDONLY with O_TRUNC escapes Landlock before 6.2
        when(numbers, argument, [*unless(_TRUNC), (_AND, 0, 0, _ACCESS), *among((1, 2))])
    for numbers, argument in _MKDIRS:  # a directory that its owner cannot enter hides its contents
        when(numbers, argument, [(_AND, 0, 0, 0o700), *among((0o700,))])
    when(_CLONE, 0, [(_BITS, 2, 0, _CLONE_NEW), (_BITS, 0, 1, _CLONE_THREAD), (_GIVE, 0, 0, ALLOW)])
    flags: Code = [(_EQUAL, 0, 3, _SETFL), (_LOAD, 0, 0, 32), *unless(_ASYNC)]
    when(_FCNTL, 1, [*among(_DESCRIPTORS), *flags])
    return [*code, (_GIVE, 0, 0, REFUSE)]


def _seccomp(code: Code) -> None:
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code), ctypes.cast(packed, ctypes.c_void_p).value)
    _check(_libc.prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")
