"""What a program must not have: capabilities, system calls that it needs for nothing honest, resources without end."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys

from evalsuite.containment import kernel
from evalsuite.containment.kernel import number

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000  # x86_64's second set of numbers
FIRST_UNKNOWN = 470  # later system calls are as unknown to the program as on an older kernel
# Memory that no process is charged for, kernel parts that are attacked often, ways to other processes or namespaces, and
# what would outlast the program. `clone3` hides its flags from the filter; the C library falls back to `clone`.
REFUSED = {
    errno.EPERM: (
        "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "add_key",
        "request_key", "keyctl", "bpf", "perf_event_open", "userfaultfd", "unshare", "setns", "mount", "umount2",
        "pivot_root", "chroot", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "open_tree", "mount_setattr",
        "fanotify_init", "name_to_handle_at", "open_by_handle_at", "quotactl", "syslog", "vmsplice",
    ),
    errno.ENOSYS: (
        "io_uring_setup", "io_uring_enter", "io_uring_register", "memfd_create", "memfd_secret", "clone3", "shmget",
        "shmat", "semget", "msgget", "mq_open", "inotify_add_watch", "io_setup", "landlock_create_ruleset",
    ),
}  # fmt: skip
NAMESPACES = 0x7E020000  # the CLONE_NEW* flags that clone can have
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6. Not vsock, which namespaces do not contain
SOL_SOCKET, BUFFER_SIZES = 1, (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF, and their FORCE
F_SETPIPE_SZ = 1031

LD, JEQ, JGE, JSET, RET = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
Instruction = tuple[int, int, int, int]


def _argument(index: int) -> int:
    """Where the low half of an argument lies in seccomp_data."""
    return 16 + 8 * index


def _if(value: int, then: list[Instruction], code: int = JEQ) -> list[Instruction]:
    """Instructions for when the loaded word is (or, by code, is at least, or shares a bit with) a value."""
    return [(code, 0, len(then), value), *then]


def _refuse(code: int) -> Instruction:
    return (RET, 0, 0, ERROR | code)


def system_call_filter() -> list[Instruction]:
    """The filter's program, in the kernel's classic BPF."""
    found: list[Instruction] = [(LD, 0, 0, 4), (JEQ, 1, 0, ARCHITECTURES[kernel.MACHINE]), (RET, 0, 0, KILL)]
    found += [(LD, 0, 0, 0)]
    found += _if(X32_BIT, [_refuse(errno.ENOSYS)], JGE) + _if(FIRST_UNKNOWN, [_refuse(errno.ENOSYS)], JGE)
    for code, names in REFUSED.items():
        for name in names:
            found += _if(number(name), [_refuse(code)])
    flags = _if(NAMESPACES, [_refuse(errno.EPERM)], JSET)
    found += _if(number("clone"), [(LD, 0, 0, _argument(0)), *flags, (RET, 0, 0, ALLOW)])
    families = [instruction for family in FAMILIES for instruction in _if(family, [(RET, 0, 0, ALLOW)])]
    found += _if(number("socket"), [(LD, 0, 0, _argument(0)), *families, _refuse(errno.EAFNOSUPPORT)])
    # A larger buffer is promised and not given, as the kernel itself does above its limit.
    sizes = [instruction for name in BUFFER_SIZES for instruction in _if(name, [_refuse(0)])]
    level = _if(SOL_SOCKET, [(LD, 0, 0, _argument(2)), *sizes])
    found += _if(number("setsockopt"), [(LD, 0, 0, _argument(1)), *level, (RET, 0, 0, ALLOW)])
    pipes = _if(F_SETPIPE_SZ, [_refuse(errno.EPERM)])
    found += _if(number("fcntl"), [(LD, 0, 0, _argument(1)), *pipes, (RET, 0, 0, ALLOW)])
    dumps = _if(kernel.PR_SET_DUMPABLE, [_refuse(errno.EPERM)])
    found += _if(number("prctl"), [(LD, 0, 0, _argument(0)), *dumps, (RET, 0, 0, ALLOW)])
    return [*found, (RET, 0, 0, ALLOW)]


def _install_filter() -> None:
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in system_call_filter())
    code = ctypes.create_string_buffer(instructions, len(instructions))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    program = Program(len(instructions) // 8, ctypes.addressof(code))
    kernel.check(kernel.libc.prctl(kernel.PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def drop(limits: dict[str, int], uid: int | None) -> None:
    """No capability and no way back to one, a session and a keyring of its own, the limits, the filter."""
    os.setsid()  # signals to "my process group" end inside
    kernel.libc.syscall(
        number("keyctl"), kernel.KEYCTL_JOIN_SESSION_KEYRING, None
    )  # kernels without keys have none to share
    for capability in range(64):
        if kernel.libc.prctl(kernel.PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        most = sys.maxsize if most == resource.RLIM_INFINITY else most
        value = min(value, most)
        # The first limit on CPU time sends a signal that can be caught, the second one ends the process.
        resource.setrlimit(kind, (value, min(value + 1, most) if name == "CPU" else value))
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kernel.syscall("capset", header, (ctypes.c_uint32 * 6)())
    # The supervisor may read this process's memory maps. It is the stronger one: nothing here can read the supervisor's.
    kernel.check(kernel.libc.prctl(kernel.PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")
    kernel.check(kernel.libc.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _install_filter()
