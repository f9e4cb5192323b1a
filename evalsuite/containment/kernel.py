"""System calls that Python's `os` lacks, by name, for x86_64 and aarch64."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWCGROUP = 0x02000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
KEYCTL_JOIN_SESSION_KEYRING = 1

MACHINE = os.uname().machine
# Numbers from arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; one number where they agree.
_NUMBERS: dict[str, tuple[int, int] | int] = {
    "add_key": (248, 217), "bpf": (321, 280), "capset": (126, 91), "chroot": (161, 51), "clone": (56, 220),
    "clone3": 435, "fanotify_init": (300, 262), "fcntl": (72, 25), "fsconfig": 431, "fsmount": 432, "fsopen": 430,
    "fspick": 433, "inotify_add_watch": (254, 27), "io_setup": (206, 0), "io_uring_enter": 426,
    "io_uring_register": 427, "io_uring_setup": 425, "kcmp": (312, 272), "keyctl": (250, 219),
    "landlock_create_ruleset": 444, "memfd_create": (319, 279), "memfd_secret": 447, "mount": (165, 40),
    "mount_setattr": 442, "move_mount": 429, "mq_open": (240, 180), "msgget": (68, 186),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "open_tree": 428, "perf_event_open": (298, 241),
    "pidfd_getfd": 438, "pivot_root": (155, 41), "prctl": (157, 167), "process_madvise": 440,
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60),
    "request_key": (249, 218), "semget": (64, 190), "setns": (308, 268), "setsockopt": (54, 208), "shmat": (30, 196),
    "shmget": (29, 194), "socket": (41, 198), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282), "vmsplice": (278, 75),
}  # fmt: skip

libc = ctypes.CDLL(None, use_errno=True)


def number(name: str) -> int:
    """The number of a system call on this machine; OSError on a machine whose numbers are not known."""
    if MACHINE not in ("x86_64", "aarch64"):
        raise OSError(0, f"programs are contained on x86_64 and aarch64, not on {MACHINE}")
    found = _NUMBERS[name]
    return found if isinstance(found, int) else found[MACHINE == "aarch64"]


def check(result: int, what: str) -> None:
    """Raise OSError with errno where a C call failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def syscall(name: str, *arguments: object) -> None:
    """Make a system call; OSError where it fails."""
    check(libc.syscall(number(name), *arguments), name)


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [v.encode() if v is not None else None for v in (source, target, kind)]
    check(libc.mount(*texts, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def read_only(target: str) -> None:
    """Make a bind mount and all below it read-only, without setuid or devices."""

    class Attributes(ctypes.Structure):
        _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                    ("userns", ctypes.c_uint64)]  # fmt: skip

    attributes = Attributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    syscall("mount_setattr", AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)


def die_with_parent(parent: int) -> None:
    """End this process by SIGKILL when its parent ends, also where it has ended already."""
    check(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "pdeathsig")
    if os.getppid() != parent:
        os._exit(1)
