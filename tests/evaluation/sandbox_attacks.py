"""Programs that try to escape from the sandbox, and a process that runs them all and reports their
effects on itself and its files: python sandbox_attacks.py {as_is,nobody} {all,fewest}, as root or
any user. This process, the parent, is the target, so that the tests are not harmed. `fewest`:
without the walls that not every machine supports.

A program passes if its attack succeeds; none may. If one did, it would do little harm: it sets what
is already set, or touches the victim.
"""

import json
import os
import resource
import socket
import sys
import tempfile
import threading
from pathlib import Path

PRELUDE = '''
import ctypes, errno, os
_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "rt_sigqueueinfo": (129, 138), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "ioprio_set": (251, 30), "fchmodat2": (452, 452), "setxattr": (188, 5), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "sethostname": (170, 161), "clock_settime": (227, 112), "mount": (165, 40), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "personality": (135, 92), "kcmp": (312, 272), "landlock_create_ruleset": (444, 444),
    "seccomp": (317, 277), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "prlimit64": (302, 261), "tgkill": (234, 131), "setsid": (112, 157), "syslog": (103, 116),
    "vmsplice": (278, 75), "timer_create": (222, 107), "openat": (257, 56), "mkdirat": (258, 34),
    "clone": (56, 220), "close_range": (436, 436), "execveat": (322, 281), "capset": (126, 91),
}
def call(name, *arguments):
    number = _NUMBERS[name][("x86_64", "aarch64").index(os.uname().machine)]
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = _libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def any_of(*attempts):
    for attempt in attempts:
        try:
            return attempt()
        except OSError:
            pass
    raise OSError("all attempts failed")
'''  # fmt: skip

# name -> program. VICTIM is a file of the parent, SECRET one that only the parent may read, PARENT
# its process id.
ATTACKS = {
    # Signals and scheduling of other processes
    "SIGKILL through F_SETOWN": """
import fcntl, time
r, w = os.pipe()
for pid in (PARENT, os.getppid()):
    fcntl.fcntl(r, fcntl.F_SETOWN, pid)
    fcntl.fcntl(r, 10, 9)  # F_SETSIG
    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(w, b"x")
""",
    "F_SETOWN_EX": """
import fcntl, struct
r, w = os.pipe()
fcntl.fcntl(r, 15, struct.pack('ii', 1, PARENT))
""",
    "O_ASYNC alone": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)",
    "FIOSETOWN": """
import fcntl, struct
r, w = os.pipe()
fcntl.ioctl(r, 0x8901, struct.pack('i', PARENT))
""",
    "kill": "any_of(lambda: os.kill(PARENT, 9), lambda: os.kill(os.getppid(), 9))",
    "killpg": """
any_of(lambda: os.killpg(0, 9), lambda: os.killpg(os.getpgrp() or 1, 9), lambda: os.kill(0, 9))
""",
    "tgkill": "any_of(*(lambda p=p: call('tgkill', p, p, 9) for p in (PARENT, os.getppid())))",
    "rt_sigqueueinfo": "call('rt_sigqueueinfo', PARENT, 9, ctypes.create_string_buffer(128))",
    "pidfd_send_signal": "call('pidfd_send_signal', call('pidfd_open', PARENT, 0), 9, None, 0)",
    "prlimit": "import struct\ncall('prlimit64', PARENT, 7, struct.pack('QQ', 3, 3), None)",
    "renice": """
any_of(*(lambda p=p: os.setpriority(os.PRIO_PROCESS, p, 19) for p in (PARENT, os.getppid(), 0)))
""",
    "renice its group": "os.setpriority(os.PRIO_PGRP, 0, 19)",
    "pin": "any_of(*(lambda p=p: os.sched_setaffinity(p, {0}) for p in (PARENT, os.getppid(), 0)))",
    "scheduler": "call('sched_setscheduler', PARENT, 5, b'\\0' * 4)",
    "ioprio": "call('ioprio_set', 1, PARENT, 3 << 13)",
    "new session": "call('setsid')",
    # Files of others
    "chmod": "os.chmod(VICTIM, 0o777)",
    "fchmodat2": "call('fchmodat2', -100, VICTIM.encode(), 0o777, 0)",
    "fchmod of what it may read": """
fd = os.open(os.__file__, os.O_RDONLY)
os.fchmod(fd, os.fstat(fd).st_mode)
""",
    "utime": "os.utime(VICTIM, (1, 1))",
    "utime of what it may read": """
fd = os.open(os.__file__, os.O_RDONLY)
kept = os.fstat(fd)
os.utime(fd, ns=(kept.st_atime_ns, kept.st_mtime_ns))
""",
    "setxattr": "os.setxattr(VICTIM, 'user.x', b'y')",
    "chown": """
any_of(
    lambda: os.chown(VICTIM, os.getuid(), os.getgid()),
    lambda: os.fchown(os.open(os.__file__, os.O_RDONLY), -1, -1),
)
""",
    "flock": """
import fcntl
fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
""",
    "lockf": """
import fcntl
fcntl.lockf(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
""",
    "lease": """
import fcntl
fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)
""",
    "writes outside": """
folders = (FOLDER, '/tmp', '/', '/dev/shm', '/var/tmp')
any_of(*(lambda f=f: open(f + '/btx_jax-escaped', 'w') for f in folders))
""",
    "writes the victim": "open(VICTIM, 'a').write('x')",
    "truncate": "os.truncate(VICTIM, 0)",
    "O_TRUNC without writing": "os.open(VICTIM, os.O_RDONLY | os.O_TRUNC)",
    "O_TRUNC with mode 3": "os.open(VICTIM, 3 | os.O_TRUNC)",
    "remove": "os.remove(VICTIM)",
    "rename": "os.rename(VICTIM, 'mine')",
    "hard link": "os.link(VICTIM, 'mine')\nopen('mine', 'a').write('x')",
    "symbolic link": "os.symlink(VICTIM, 'mine')\nopen('mine', 'a').write('x')",
    "device file": """
import stat
any_of(
    lambda: os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0)),
    lambda: os.mknod('mem', stat.S_IFCHR | 0o600, os.makedev(1, 1)),
)
""",
    "locked folder": "os.mkdir('locked', 0)",
    # Reading
    "the user's files": "assert open(SECRET).read()",
    "the project's files": "assert open(PROJECT).read()",
    "/etc/passwd": "assert open('/etc/passwd').read()",
    "lists the user's folder": "assert os.listdir(FOLDER)",
    "/proc of the parent": """
files = ('cmdline', 'environ', 'maps', 'status')
any_of(*(lambda f=f: open(f'/proc/{PARENT}/{f}', 'rb').read() for f in files))
""",
    "links in /proc": """
any_of(*(lambda f=f: os.readlink(f'/proc/{PARENT}/{f}') for f in ('exe', 'cwd', 'fd/0')))
""",
    "its own memory as a file": "open('/proc/self/mem', 'r+b')",
    "environment": "assert os.environ['BTX_ATTACKED_SECRET']",
    "stdin": "import sys\nassert sys.stdin.read() or os.read(0, 1)",
    "inherited descriptors": """
assert any(os.path.exists(f'/proc/self/fd/{n}') or os.fstat(n) for n in range(5, 64))
""",
    # Memory, disk, time
    "SysV shared memory": "call('shmget', 0x42545831, 4096, 0o1666)",
    "SysV semaphores": "call('semget', 0x42545831, 1, 0o1666)",
    "SysV messages": "call('msgget', 0x42545831, 0o1666)",
    "POSIX messages": "call('mq_open', b'btx_jax', os.O_RDWR | os.O_CREAT, 0o666, None)",
    "memfd": "fd = call('memfd_create', b'x', 0)\nfor _ in range(64): os.write(fd, bytes(1 << 20))",
    "two gigabytes": "x = bytearray(2 << 30)",
    "a large file": "open('big', 'wb').write(bytes(1 << 21))",
    "a full disk": """
for i in range(80): open(f'f{i}', 'wb').write(bytes(1 << 20))
import time
time.sleep(.5)
""",
    "many files": "for i in range(5000): open(f'f{i}', 'wb').close()\nimport time\ntime.sleep(.5)",
    "many threads": """
import threading, time
threading.stack_size(1 << 15)
for _ in range(2000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
time.sleep(.5)
""",
    "infinite loop": "while True: pass",
    "ignores SIGXCPU and SIGTERM": """
import signal
for s in (signal.SIGXCPU, signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
while True: pass
""",
    "sleeps": "import time\ntime.sleep(100)",
    "output flood": "while True: print('x' * 10000)",
    "error flood": "import sys\nwhile True: sys.stderr.write('x' * 10000)",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
    # Processes
    "fork bomb": "for _ in range(9): os.fork()",
    "process": "import subprocess\nsubprocess.run(['true'], check=True)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "execve": "import sys\nos.execv(sys.executable, ['python', '-c', ''])",
    "execveat": "import sys\ncall('execveat', -100, sys.executable.encode(), None, None, 0)",
    "clone": "call('clone', 17, 0, 0, 0, 0) or os._exit(0)",
    "clone into name spaces": "call('clone', 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0)",
    # Privileges of root
    "host name": "name = os.uname().nodename.encode()\ncall('sethostname', name, len(name))",
    "clock": """
import struct, time
call('clock_settime', 0, struct.pack('ll', int(time.time()), 0))
""",
    "mount": "call('mount', b'none', b'.', b'tmpfs', 0, None)",
    "chroot": "call('chroot', b'/')",
    "unshare": "call('unshare', 0x10000000)",
    "setns": "call('setns', os.open('.', os.O_RDONLY), 0)",
    "another user": """
any_of(
    lambda: os.setuid(0) if os.getuid() else os.setuid(1),
    lambda: os.setgroups([0]),
    lambda: os.setgid(12),
)
""",
    "capabilities": """
import struct
call('capset', struct.pack('Ii', 0x20080522, 0), b'\\xff' * 24)
""",
    "kernel log": "call('syslog', 10, None, 0)",
    # Entry points of the kernel
    "socket": "import socket\nsocket.socket()",
    "socket pair": "import socket\nsocket.socketpair()",
    "connects": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)",
    "ptrace": """
any_of(lambda: call('ptrace', 0, 0, 0, 0), lambda: call('ptrace', 16, PARENT, 0, 0))
""",
    "process_vm_readv": """
b = ctypes.create_string_buffer(16)
call('process_vm_readv', PARENT, b, 0, b, 0, 0)
""",
    "io_uring": "call('io_uring_setup', 1, ctypes.create_string_buffer(120))",
    "bpf": "call('bpf', 0, ctypes.create_string_buffer(120), 120)",
    "perf": "call('perf_event_open', ctypes.create_string_buffer(120), 0, -1, -1, 0)",
    "userfaultfd": "call('userfaultfd', 1)",
    "keys": "call('add_key', b'user', b'btx', b'x', 1, -3)",
    "personality": "call('personality', 0x40000)",
    "kcmp": "call('kcmp', os.getpid(), os.getpid(), 0, 0, 0)",
    "Landlock": "call('landlock_create_ruleset', None, 0, 1)",
    "seccomp": "call('seccomp', 2, 0, None)",
    "inotify": "call('inotify_init1', 0)",
    "fanotify": "call('fanotify_init', 0, 0)",
    "vmsplice": "call('vmsplice', os.pipe()[1], b'\\0' * 16, 0, 0)",
    "timer": "call('timer_create', 0, None, ctypes.create_string_buffer(8))",
    "open of high bits": """
call('openat', -100, VICTIM.encode(), (1 << 40) | os.O_WRONLY | os.O_TRUNC, 0)
""",
    "x32": "r = _libc.syscall(ctypes.c_long(0x40000000 + 39))\nassert r > 0",
    "32-bit calls": """
import mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20 (getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
assert ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0
""",
    # Verdicts without tests
    "leaves early": "os._exit(0)",
    "exits with success": "raise SystemExit(0)",
    "says that it could not be contained": "import sys\nsys.exit('sandbox: seccomp: no')",
    "raises": "assert 1 == 2, 'wrong answer'",
    "overflows the stack": "ctypes.string_at(0)",
    "not Python": "def f(:",
}  # fmt: skip

# Wrong solutions of "the square of x" that try to pass; the tests are in another process.
FORGERIES = {
    "wrong": "def square(x): return 5",
    "nothing": "",
    "equal to all": """
class A:
    def __eq__(self, other): return True
    __hash__ = None
def square(x): return A()
""",
    "an int equal to all": """
class A(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def square(x): return A(7)
""",
    "a float class equal to all": """
class A(float):
    def __eq__(self, other): return True
    def hex(self): return '0x9p0'
def square(x): return A(7)
""",
    "frames": """
import sys
def square(x):
    frame = sys._getframe(0)
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            for way in ("send", "append"):
                try: getattr(value, way)("passed", "")
                except Exception: pass
        frame = frame.f_back
""",
    "expected values in memory": """
import gc, sys
def square(x):
    for o in gc.get_objects():
        if isinstance(o, dict):
            for key, value in list(o.items()):
                if type(value) is str and "assert candidate(12)" in value: return 144
    for frame in sys._current_frames().values():
        while frame:
            if 144 in frame.f_code.co_consts: return 144
            frame = frame.f_back
""",
    "writes to every descriptor": """
import json, os, struct
def say(*message):
    data = json.dumps(message).encode()
    for fd in range(64):
        for text in (struct.pack("!I", len(data)) + data, data, b'{"passed": true, "why": ""}\\n'):
            try: os.write(fd, text)
            except OSError: pass
def square(x):
    say("passed", "")
    os._exit(0)
""",
    "answers instead of the harness": """
import json, os, struct
data = json.dumps(["contained"]).encode() + b""
for message in (["loaded"], ["passed", ""], ["passed", ""]):
    data = json.dumps(message).encode()
    os.write(4, struct.pack("!I", len(data)) + data)
os._exit(0)
""",
    "says that it could not be contained, to the judge": """
import json, os, struct
data = json.dumps(["refused", "Landlock: no"]).encode()
os.write(4, struct.pack("!I", len(data)) + data)
def square(x): return 0
""",
    "sys.modules": """
import sys
main = sys.modules["__main__"]
for name in list(vars(main)):
    if callable(getattr(main, name)) and not name.startswith("__"):
        setattr(main, name, lambda *a, **k: ("passed", ""))
def square(x): return None
""",
    "builtins": """
import builtins, json
builtins.AssertionError = Exception
builtins.eval = lambda *a: (lambda *b: 144)
json.dumps = lambda *a, **k: '["passed", ""]'
def square(x): return None
""",
    "patches check": "def check(candidate): pass\ndef square(x): return 0",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "raises SystemExit": "def square(x): raise SystemExit(0)",
    "raises StopIteration": "def square(x): raise StopIteration",
    "raises KeyboardInterrupt": "def square(x): raise KeyboardInterrupt",
    "kills itself": "import os\ndef square(x): os.kill(os.getpid(), 9)\nimport signal",
    "says nothing": "import time\ndef square(x): time.sleep(100)",
    "a flood of answer": "def square(x): return 'x' * (1 << 28)",
    "deep": "def square(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "empties its argument": "def square(x): return x.clear()",
    "a pickle": "class A:\n    def __reduce__(self): return (print, ())\ndef square(x): return A()",
    "closes its descriptors": "import os\nos.closerange(0, 64)\ndef square(x): return 144",
    "a longer message": "import os\nos.write(4, b'\\xff' * 64)\ndef square(x): return 144",
}  # fmt: skip
TEST = """
def check(candidate):
    assert all(map(lambda x: candidate(x) == x * x, (2, 3)))
    assert candidate(12) == 144
"""


def state(victim: Path) -> dict:
    """State that an attack may change: the victim, this process, and shared resources."""
    entry = victim.stat()
    kept = Path("/proc/sysvipc")
    return {
        "content": victim.read_text(),
        "entry": [entry.st_mode, entry.st_uid, entry.st_gid, entry.st_mtime_ns, entry.st_nlink],
        "attributes": os.listxattr(victim),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)),
        "ipc": [(kept / name).read_text().count("\n") for name in ("shm", "sem", "msg")],
        "host": socket.gethostname(),
        "session": os.getsid(0),
    }


def main(extent: str) -> dict:
    from btx_jax.evaluation import sandbox

    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as server:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = folder
        os.environ["BTX_ATTACKED_SECRET"] = "secret"
        victim, secret = Path(folder, "victim"), Path(folder, "secret")
        victim.write_text("whole")
        secret.write_text("secret")
        secret.chmod(0o600)
        server.bind(("127.0.0.1", 0))
        server.listen()
        values = {
            "VICTIM": str(victim), "SECRET": str(secret), "FOLDER": folder, "PARENT": os.getpid(),
            "PORT": server.getsockname()[1], "PROJECT": sandbox.__file__,
        }  # fmt: skip
        start = PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in values.items())
        before, known = state(victim), sorted(os.listdir(folder))
        walls = sandbox._walls() if extent == "all" else ()
        sandbox._walls = lambda: walls
        limits = sandbox.Limits(seconds=1)
        programs = [*(start + code for code in ATTACKS.values()), *FORGERIES.values()]
        tests = [None] * len(ATTACKS) + [sandbox.UnitTests(TEST, "square")] * len(FORGERIES)
        outcomes = sandbox.run_programs(programs, limits, 6, show=False, tests=tests)
        after, left = state(victim), sorted(os.listdir(folder))
        running = [
            entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and _mine(entry)
        ]
    return {
        "user": user,
        "walls": walls,
        "passed": [n for n, o in zip([*ATTACKS, *FORGERIES], outcomes, strict=True) if o.passed],
        "why": {n: o.why for n, o in zip([*ATTACKS, *FORGERIES], outcomes, strict=True)},
        "changed": [name for name in before if before[name] != after[name]],
        "left": [name for name in left if name not in known],
        "running": len(running),
        "threads": threading.active_count(),
    }


def _mine(process: Path) -> bool:
    """Whether a process is an unfinished sandbox of this one."""
    try:
        return f"/{os.getpid()}/" in (process / "cmdline").read_text().replace("\0", " ") or (
            f"PPid:\t{os.getpid()}\n" in (process / "status").read_text()
        )
    except OSError:
        return False


def as_nobody(arguments: list[str]) -> None:
    """Become user 65534. Directories that only root may enter and that contain the interpreter or
    this project are first exposed to this process, by mounts that show only these."""
    from btx_jax.evaluation import sandbox_walls as walls

    def locked(path: str) -> list[str]:
        outer = map(str, reversed(Path(path).parents))
        return [folder for folder in outer if not os.stat(folder).st_mode & 1]

    needed = {sys.base_prefix, sys.prefix, str(Path(__file__).parents[2])}
    if hidden := sorted(filter(locked, needed), key=len):
        walls.unshare(walls._NEW_MOUNTS)
        walls._mount(None, "/", None, walls._MS_REC | walls._MS_PRIVATE)
        held = {path: os.open(path, os.O_PATH) for path in hidden}
        for path in hidden:
            if outer := locked(path):  # another path may have exposed it already
                walls._mount("tmpfs", outer[0], "tmpfs", 0, "mode=755")
            os.makedirs(path, exist_ok=True)
            walls._mount(f"/proc/self/fd/{held[path]}", path, None, walls._MS_BIND)
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    os.environ["HOME"] = "/"
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    user, extent = sys.argv[1:]
    if user == "nobody":
        as_nobody(["as_is", extent])
    print(json.dumps(main(extent)))
