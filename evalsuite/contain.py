"""Runs one program contained. Started by `sandbox.py` as `python -I contain.py`, standard library only.

Standard input brings a JSON object: program, roots (folders that Python needs, read-only), limits. File descriptor 3 takes
the verdict. The program runs in namespaces of its own: nothing of the network, of other processes or of the file system
but the roots is there; a small scratch folder is all that can be written. It runs without privileges, under limits on CPU
time, memory, processes, file size and open files. Its parent dies, it dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
SYS_PIVOT_ROOT, SYS_CAPSET, SYS_MOUNT_SETATTR = {"x86_64": (155, 126, 442), "aarch64": (41, 91, 442)}[
    os.uname().machine
]
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
VERDICT_FD = 3
UNPRIVILEGED = 65000  # a uid without files, when started by root

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError with errno where a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [v.encode() if v is not None else None for v in (source, target, kind)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")


def read_only(target: str) -> None:
    """Make a bind mount and all below it read-only, without setuid or devices."""

    class Attributes(ctypes.Structure):
        _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64), ("propagation", ctypes.c_uint64),
                    ("userns", ctypes.c_uint64)]  # fmt: skip

    attributes = Attributes(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    result = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    check(result, f"read-only {target}")


def enter_namespaces() -> None:
    """New mount, process, network, IPC and host-name spaces; for an ordinary user inside a new user space."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(flags | (CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as stream:
                stream.write(text)


def is_mapped(uid: int) -> bool:
    """Whether this user space has that uid: root of a container or of a namespace may have none but its own."""
    with open("/proc/self/uid_map") as stream:
        return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, stream))


def build_root(roots: list[str], scratch_bytes: int) -> None:
    """A new root on a small file system in memory: the roots read-only, three devices, and /tmp to write in."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    new = "/tmp"
    # The next mount hides /tmp; roots that lie in it are reached through descriptors opened before.
    opened = {path: os.open(path, os.O_PATH) for path in roots if not os.path.islink(path)}
    mount("tmpfs", new, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, descriptor in opened.items():
        os.makedirs(new + path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", new + path, None, MS_BIND | MS_REC)
        read_only(new + path)
        os.close(descriptor)
    for path in roots:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(new + path), exist_ok=True)
            os.symlink(os.readlink(path), new + path)
    os.makedirs(f"{new}/dev", exist_ok=True)
    for device in ("null", "zero", "urandom"):
        os.close(os.open(f"{new}/dev/{device}", os.O_CREAT | os.O_WRONLY))
        mount(f"/dev/{device}", f"{new}/dev/{device}", None, MS_BIND)
    os.makedirs(f"{new}/tmp", exist_ok=True)
    mount("tmpfs", f"{new}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},mode=1777")
    os.chdir(new)
    check(libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "detach the old root")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")


def drop_privileges(limits: dict[str, int], was_root: bool) -> None:
    """No capability, no way back to one, an unprivileged user, and the limits."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if was_root:
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(libc.syscall(SYS_CAPSET, header, (ctypes.c_uint32 * 6)()), "capset")
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def execute(program: str) -> tuple[bool, str]:
    """Run the program to its end. Only a program that gets there without an exception has passed."""
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(program, "<program>", "exec"), namespace)  # noqa: S102 - what the containment is for
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt are failures too
        return False, f"{type(error).__name__}: {error}"[:300]
    return True, ""


def main() -> None:
    """Set up, run, answer. The answer names the nonce, which the program's own code is never given."""
    task = json.loads(sys.stdin.buffer.read())
    was_root = os.getuid() == 0 and is_mapped(UNPRIVILEGED)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    enter_namespaces()
    build_root(task["roots"], task["scratch_bytes"])
    pid = os.fork()
    if pid:
        os.close(VERDICT_FD)
        os.waitpid(pid, 0)
        os._exit(0)
    # Process 1 of its own space: when it ends, the kernel kills all the others in there.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nonce, program, limits = task.pop("nonce"), task.pop("program"), task["limits"]
    # Another secret for the way from the program's process to here: writing to every descriptor forges nothing.
    token = os.urandom(16).hex()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # The program's process: it knows no nonce and has no verdict pipe.
        nonce = ""
        os.close(VERDICT_FD)
        os.close(reader)
        answer, leave, encode = os.write, os._exit, json.dumps
        drop_privileges(limits, was_root)
        passed, reason = execute(program)
        answer(writer, encode([passed, reason, token]).encode())
        leave(0)
    os.close(writer)
    parts: list[bytes] = []
    while sum(map(len, parts)) < 4096 and (part := os.read(reader, 4096)):
        parts.append(part)
        if part.endswith(b"]"):
            break
    try:
        passed, reason, given = json.loads(b"".join(parts))
        if given != token:
            raise ValueError(given)
    except (ValueError, TypeError):
        passed, reason = False, "the program ended before its tests did"
    os.write(VERDICT_FD, json.dumps({"nonce": nonce, "passed": passed is True, "reason": str(reason)}).encode())
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        os.write(VERDICT_FD, json.dumps({"setup": str(error)}).encode())
        os._exit(1)
