"""The world that a program sees: namespaces of its own, a read-only root in memory, small scratch folders."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from evalsuite.containment import kernel
from evalsuite.containment.kernel import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_REC, mount

FIRST_UID = 1 << 30  # started by root, a program runs under FIRST_UID + the number of its process: a uid without files
DEVICES = ("null", "zero", "full", "random", "urandom")
SCRATCH = ("/tmp", "/dev/shm")  # what can be written in; multiprocessing keeps its semaphores in the second
WORK = "/tmp/program"  # where a program starts: an empty folder, whatever else lies in /tmp
FILES = {  # in /etc: the program's own name and its host's
    "passwd": "program:x:{uid}:{gid}::/tmp:/bin/sh\n",
    "group": "program:x:{gid}:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "hosts: files\n",
}
INODES = 4096  # files and folders in each scratch folder
TCP_BYTES = "4096 16384 65536"  # least, first and largest buffer of a connection


def enter() -> int | None:
    """Give this process namespaces of its own; its children are in a new process space. Returns the uid for the program,
    None where it keeps this one: then all is inside a new user space, which has a limit on processes of its own.
    """
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    uid, gid, own = os.getuid(), os.getgid(), FIRST_UID + os.getpid()
    if uid == 0 and _is_mapped(own):
        kernel.check(kernel.libc.unshare(flags), "unshare")
        return own
    kernel.check(kernel.libc.unshare(flags | kernel.CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    return None


def _is_mapped(uid: int) -> bool:
    """Whether this user space has that uid: root of a container or of a namespace may have few."""
    with open("/proc/self/uid_map") as stream:
        return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, stream))


def build_root(task: dict[str, Any], uid: int | None) -> int:
    """Make the new root, in process 1 of the new process space. Returns a descriptor of that space's /proc, which is
    itself nowhere to be found in the new root.
    """
    mount("none", "/", None, MS_REC | kernel.MS_PRIVATE)
    new = "/tmp"
    # The next mount hides /tmp; roots that lie in it are reached through descriptors opened before.
    links = {path: os.readlink(path) for path in task["roots"] if os.path.islink(path)}
    opened = {path: os.open(path, os.O_PATH) for path in task["roots"] if path not in links}
    mount("tmpfs", new, "tmpfs", MS_NOSUID | MS_NODEV, f"size=1m,nr_inodes={INODES},mode=755")
    for path in SCRATCH:  # before the roots, of which some may lie in it: an environment in /tmp
        os.makedirs(new + path, exist_ok=True)
        data = f"size={task['scratch_bytes']},nr_inodes={INODES},mode=1777"
        mount("tmpfs", new + path, "tmpfs", MS_NOSUID | MS_NODEV, data)
    os.makedirs(new + WORK)
    os.chmod(new + WORK, 0o1777)
    for path, descriptor in opened.items():
        os.makedirs(new + path, exist_ok=True)
        mount(f"/proc/self/fd/{descriptor}", new + path, None, MS_BIND | MS_REC)
        kernel.read_only(new + path)
        os.close(descriptor)
    for path, target in links.items():
        os.makedirs(os.path.dirname(new + path), exist_ok=True)
        os.symlink(target, new + path)
    for path in task["hidden"]:
        mount("tmpfs", new + path, "tmpfs", MS_NOSUID | MS_NODEV | kernel.MS_RDONLY, "size=4k,nr_inodes=2,mode=555")
    for device in DEVICES:
        os.makedirs(f"{new}/dev", exist_ok=True)
        os.close(os.open(f"{new}/dev/{device}", os.O_CREAT | os.O_WRONLY))
        mount(f"/dev/{device}", f"{new}/dev/{device}", None, MS_BIND)
    os.makedirs(f"{new}/etc", exist_ok=True)
    for name, text in FILES.items():
        with open(f"{new}/etc/{name}", "w") as stream:
            stream.write(text.format(uid=os.getuid() if uid is None else uid, gid=os.getgid() if uid is None else uid))
    os.makedirs(f"{new}/proc", exist_ok=True)
    mount("proc", f"{new}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    processes = os.open(f"{new}/proc", os.O_RDONLY | os.O_DIRECTORY)
    _raise_loopback()
    os.chdir(new)
    kernel.syscall("pivot_root", b".", b".")
    kernel.check(kernel.libc.umount2(b".", kernel.MNT_DETACH), "detach the old root")
    kernel.check(kernel.libc.umount2(b"/proc", kernel.MNT_DETACH), "detach /proc")
    mount("none", "/", None, kernel.MS_REMOUNT | MS_BIND | kernel.MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(WORK)
    return processes


def _raise_loopback() -> None:
    """127.0.0.1 of the program's own network, which has nothing else; left down where TCP's buffers cannot be bounded."""
    import fcntl
    import socket

    try:
        for name in ("tcp_rmem", "tcp_wmem"):
            with open(f"/proc/sys/net/ipv4/{name}", "w") as stream:
                stream.write(TCP_BYTES)
    except OSError:
        return
    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = b"lo".ljust(16, b"\0") + bytes(ctypes.c_short(IFF_UP)) + bytes(22)
        fcntl.ioctl(control, SIOCSIFFLAGS, request)
