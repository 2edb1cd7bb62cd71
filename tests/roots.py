"""Bare Debian roots, made once with debootstrap, and machines in throw-away copies of them.

A machine is a set of namespaces (mounts, processes, a network with only a loopback, host name)
over an overlay of a root in memory; with `booted` its first process is systemd. Needs root.
"""

import fcntl
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

SUITES = ("bullseye", "bookworm", "trixie")  # the current stable and the two before it
BARE = "python3,git"
BOOTED = "python3,git,systemd-sysv,dbus,openssh-server,openssh-client,ca-certificates,curl"
NEEDED = ("debootstrap", "apt-get", "unshare", "nsenter", "mount", "ip")
BOOT_TIMEOUT_S = 300
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # netdevice(7)


def why_not():
    """Why no root can be made here; "" where it can."""
    if os.getuid():
        return "Debian roots need root"
    missing = [tool for tool in NEEDED if not shutil.which(tool)]
    return "Debian roots need %s" % " and ".join(missing) if missing else ""


def find_mirror():
    """The Debian mirror in apt's own sources, which has every suite."""
    form = "$(LABEL)|$(RELEASE)|$(REPO_URI)"
    lines = subprocess.check_output(["apt-get", "indextargets", "--format", form])
    for line in lines.decode().splitlines():
        label, release, uri = line.split("|", 2)
        if label == "Debian" and "-" not in release:
            return uri
    raise AssertionError("no Debian mirror in apt's sources; run apt-get update")


def find_root(suite, packages=BARE):
    """The folder of a root of that suite; made where it isn't there yet, which takes a minute."""
    cache = Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache", "server-update", "roots")
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / suite
    if packages != BARE:
        root = cache / ("%s-%08x" % (suite, zlib.crc32(packages.encode())))
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            half = cache / (root.name + ".new")
            shutil.rmtree(str(half), ignore_errors=True)
            command = ["debootstrap", "--variant=minbase", "--include=" + packages, suite]
            done = subprocess.run(
                command + [str(half), find_mirror()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            log = done.stdout.decode("utf-8", "replace")
            assert done.returncode == 0, "%s failed:\n%s" % (" ".join(command), log[-3000:])
            half.rename(root)
    return root


class Machine:
    """A running copy of a root; close() ends all its processes and forgets what they wrote.

    Its /srv is our folder `srv`, since git works in no path below /proc/PID/root; several may
    share one.
    """

    def __init__(self, root, work, booted=False, srv=None):
        self.log, self.srv = work / "log", srv or work / "srv"
        work.mkdir(parents=True)
        self.srv.mkdir(exist_ok=True)
        command = ["unshare", "-m", "-p", "-n", "-u", "-i", "-C", "--fork", "--kill-child=KILL"]
        command += [sys.executable, "-I", __file__, str(root), str(work), str(self.srv)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command + ["booted"] * booted, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = None
        self._await(lambda: self._find_init(work / "fs/root"), "its first process")
        if booted:
            self._await(self._is_booted, "systemd")

    def _await(self, is_done, what):
        end = time.monotonic() + BOOT_TIMEOUT_S
        while not is_done():
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise AssertionError("no %s:\n%s" % (what, self.log.read_text()[-3000:]))
            time.sleep(0.05)

    def _find_init(self, root):
        try:
            children = "/proc/{0}/task/{0}/children".format(self.process.pid)
            pid = int(Path(children).read_text().split()[0])
            if os.readlink("/proc/%d/root" % pid) == str(root):
                self.pid = pid
        except (OSError, IndexError):
            pass  # not yet
        return self.pid

    def _is_booted(self):
        return self.run("systemctl", "is-system-running").stdout in ("running\n", "degraded\n")

    def path(self, name):
        """A path of the machine, as we can open it from outside."""
        return Path("/proc/%d/root" % self.pid, name.lstrip("/"))

    def command(self, *args, env=None, cwd="/root"):
        """The command that runs a command inside."""
        env = dict({"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}, **(env or {}))
        enter = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-u", "-i", "-C", "-r", "-w"]
        change = ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", cwd]
        words = ["%s=%s" % item for item in env.items()]
        return enter + ["/usr/bin/env", "-i"] + words + change + list(args)

    def run(self, *args, timeout=300, **kwargs):
        """Run it inside, to its end; the CompletedProcess, both outputs as text in stdout."""
        return subprocess.run(
            self.command(*args, **kwargs),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            timeout=timeout,
        )

    def check(self, *args, **kwargs):
        """The same for what must succeed; its output."""
        done = self.run(*args, **kwargs)
        assert done.returncode == 0, "%s: %d\n%s" % (args, done.returncode, done.stdout)
        return done.stdout

    def close(self):
        """Kill everything inside."""
        self.process.kill()
        self.process.wait()


def connect(machines):
    """Put machines, {name: Machine}, on one network, where each finds the others by name."""
    hosts = "127.0.0.1 localhost\n"
    hub = list(machines.values())[0]
    set_ip(hub, "link", "add", "name", "net", "type", "bridge")
    set_ip(hub, "link", "set", "net", "up")
    for number, (name, machine) in enumerate(machines.items(), 1):
        address = "192.0.2.%d" % number  # RFC 5737
        hosts += "%s %s\n" % (address, name)
        if machine is hub:
            set_ip(hub, "address", "add", address + "/24", "dev", "net")
            continue
        port = "port-%d" % number
        peer = ["peer", "name", "uplink", "netns", str(machine.pid)]
        set_ip(hub, "link", "add", "name", port, "type", "veth", *peer)
        set_ip(hub, "link", "set", port, "master", "net", "up")
        set_ip(machine, "address", "add", address + "/24", "dev", "uplink")
        set_ip(machine, "link", "set", "uplink", "up")
    for machine in machines.values():
        machine.path("/etc/hosts").write_text(hosts)


def set_ip(machine, *words):
    """Run ip in the network of a machine, which has no ip of its own."""
    subprocess.check_call(["nsenter", "-t", str(machine.pid), "-n", "ip", *words])


# --- what the first process of a machine does, before it is that ---


def mount(kind, target, *options, source=None):
    target.mkdir(parents=True, exist_ok=True)
    words = ["-o", ",".join(options)] if options else []
    subprocess.check_call(["mount", "-t", kind, *words, source or kind, str(target)])


def build(root, work, srv):
    """Mount the overlay and what every Linux has; the folder that it is at."""
    mount("tmpfs", work / "fs")
    work = work / "fs"
    for name in ("upper", "scratch"):
        (work / name).mkdir()
    parts = "lowerdir=%s,upperdir=%s,workdir=%s" % (root, work / "upper", work / "scratch")
    mount("overlay", work / "root", parts)
    subprocess.check_call(["mount", "--bind", srv, str(work / "root/srv")])
    mount("proc", work / "root/proc")
    mount("sysfs", work / "root/sys", "ro")
    mount("cgroup2", work / "root/sys/fs/cgroup")
    mount("tmpfs", work / "root/run", "mode=755")
    mount("tmpfs", work / "root/dev", "mode=755")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        (work / "root/dev" / name).touch()
        subprocess.check_call(["mount", "--bind", "/dev/" + name, str(work / "root/dev" / name)])
    mount("devpts", work / "root/dev/pts", "newinstance", "ptmxmode=666")
    (work / "root/dev/ptmx").symlink_to("pts/ptmx")
    (work / "root/dev/fd").symlink_to("/proc/self/fd")
    mount("tmpfs", work / "root/dev/shm", "mode=1777")
    return work / "root"


def raise_loopback():
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        name, flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", name, flags | IFF_UP))


def main(root, work, srv, *booted):
    socket.sethostname("machine")
    top = build(Path(root), Path(work), srv)
    raise_loopback()
    os.chroot(str(top))
    os.chdir("/")
    if booted:
        words = ["systemd", "--log-target=console"]
        os.execve("/lib/systemd/systemd", words, {"container": "test"})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:  # reap orphans, as the first process has to
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
