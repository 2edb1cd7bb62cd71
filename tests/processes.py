"""Other processes: wait for what they do, find them, look at them, end them."""

import os
import re
import resource
import threading
import time
from pathlib import Path
from signal import SIGKILL

LISTENS = "0A"  # in /proc/net/tcp
LATEST_S = 120  # by then what is waited for has happened also on a busy machine


def wait_until(true, timeout=None, every=0.01, what="it"):
    """Wait until true() is; its value. For what sends no event: a file, another process.

    For LATEST_S at most, or `timeout`.
    Who has waited for long looks less often, which leaves the processor to what is waited for.
    """
    timeout = timeout or LATEST_S
    began = time.monotonic()
    while True:
        value = true()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > timeout:
            raise AssertionError("%s did not come true within %s s" % (what, timeout))
        time.sleep(max(every, min(waited / 20, 0.1)))


def system_calls(log):
    """What `strace -f -o log` wrote, as text: a line for each system call, where it ended.

    A call during which another process is heard of is two lines there, "<unfinished ...>" and
    "<... resumed>": on a busy machine any call can be.
    """
    begun, lines, unfinished = {}, [], " <unfinished ...>"
    for line in log.read_text().splitlines():
        pid = line.split(" ", 1)[0]
        resumed = re.match(r"\d+ +<\.\.\. \w+ resumed>", line)
        if resumed:
            line = begun.pop(pid, "") + line[resumed.end() :]
        if line.endswith(unfinished):
            begun[pid] = line[: -len(unfinished)]
        else:
            lines.append(line)
    return "\n".join(lines + list(begun.values())) + "\n"


def processes_below(folder):
    """The processes whose environment has a HOME below `folder`: a slave's descendants."""
    found, mark = [], os.fsencode(str(folder)) + b"/"
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open("/proc/%s/environ" % entry, "rb") as environ:
                    if b"HOME=" + mark in environ.read():
                        found.append(int(entry))
            except OSError:
                pass  # gone, or somebody else's
    return found


def fleet_runs_below(folder):
    """The processes of server-update that relays whose HOME is below `folder` run."""
    found = []
    for pid in processes_below(folder):
        try:
            with open("/proc/%d/cmdline" % pid, "rb") as command:
                if b"/server-update\0--json" in command.read():
                    found.append(pid)
        except OSError:
            pass  # gone
    return found


def descendants(pid):
    """The processes that `pid` has started, and theirs, as far as their parents live."""
    found = []
    try:
        with open("/proc/%d/task/%d/children" % (pid, pid)) as children:
            found = [int(child) for child in children.read().split()]
    except OSError:
        pass
    return found + [deeper for child in found for deeper in descendants(child)]


def is_alive(pid):
    """Whether a process runs; one that has ended and isn't reaped yet does not."""
    try:
        with open("/proc/%d/stat" % pid) as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def rss_kib(pid):
    """The memory that a process holds, in KiB."""
    with open("/proc/%d/status" % pid) as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1))


def threads_of(pid):
    """How many threads a process has."""
    return len(os.listdir("/proc/%d/task" % pid))


def sockets_of(pid):
    """The sockets that a process holds, listening ones aside: (local, remote, state) in hex."""
    inodes = set()
    for name in os.listdir("/proc/%d/fd" % pid):
        try:
            link = os.readlink("/proc/%d/fd/%s" % (pid, name))
        except OSError:
            continue  # closed meanwhile
        inodes.add(link[len("socket:[") : -1] if link.startswith("socket:") else None)
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            rows = [line.split() for line in lines]
        found += [tuple(row[1:4]) for row in rows[1:] if row[9] in inodes and row[3] != LISTENS]
    return found


def cpu_s(pid):
    """The processor's time that a process has used, ended or not, until it is reaped."""
    with open("/proc/%d/stat" % pid) as stat:
        user, system = stat.read().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def cpu_s_of_children():
    """The processor's time of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kill(pid, number=SIGKILL):
    """Signal a process that may be gone already."""
    try:
        os.kill(pid, number)
    except OSError:
        pass


def kill_all_below(folder):
    """kill -9 of what processes_below finds, until it finds nothing: one may start others."""

    def is_empty():
        found = processes_below(folder)
        for pid in found:
            kill(pid)
        return not found

    wait_until(is_empty, what="the end of all below %s" % folder)


class ProcessList(threading.Thread):
    """The arguments that processes of this machine have while they run.

    What runs only for an instant may be missed; look() sees what runs now for certain.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.seen = set()
        self.is_over = threading.Event()
        self.start()

    def run(self):
        while not self.is_over.wait(0.02):
            self.look()

    def look(self):
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                self.seen.add(Path("/proc", name, "cmdline").read_bytes())
            except OSError:  # it has ended
                continue

    def arguments(self):
        """All that were seen until now, with a NUL after each."""
        return b"\n".join(self.seen.copy()).decode("utf-8", "replace")

    def stop(self):
        """Look no more; the arguments."""
        self.is_over.set()
        self.join()
        return self.arguments()
