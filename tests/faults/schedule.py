"""The faults, and the seeded schedule that says which happens when to whom.

A fault is a function (fleet, slave, rng) that does the damage; what it may return ends it.
A schedule is a pure function of its seed, so that a seed replays: same faults, times and slaves.
(The threads and processes under it run as they please, so a replay is close, not exact.)
"""
import contextlib
import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections import namedtuple

from fleet import FEW_FILES, VOLUME
from processes import kill, processes_below

# at: seconds from the round's start; slave: its index
Event = namedtuple("Event", "at kind slave lasts seed")
OTHER_USER = 12345
GARBAGE = [b"", b"{", b"\0" * 200, b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"repo": 1}',
           b'{"repo": "site", "update": "x"}']


def parents():
    """{pid: its parent} of all processes."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open("/proc/%s/stat" % entry, "rb") as stat:
                found[int(entry)] = int(stat.read().rsplit(b")", 1)[1].split()[1])
    return found


def children_of(slave):
    """What runs on a slave besides slave.py itself."""
    return [pid for pid in processes_below(slave.folder) if pid != slave.process.pid]


def restart(slave):
    """Start slave.py again if it is down; True once it listens."""
    if slave.process.poll() is not None:
        slave.start()
    return True


# -- faults of a slave ---------------------------------------------------------------------------


def kill_slave(fleet, slave, rng):
    """kill -9 of slave.py; what it had started goes on by itself."""
    slave.kill()
    return lambda: restart(slave)


def kill_everything(fleet, slave, rng):
    """kill -9 of slave.py and of all that it had started, as at a loss of power."""
    slave.kill()
    for pid in children_of(slave):
        kill(pid, signal.SIGKILL)
    return lambda: restart(slave)


def kill_a_child(fleet, slave, rng):
    """kill -9 of one process of a running update: the shell, git, a part of git, python3."""
    pids = children_of(slave)
    if pids:
        kill(rng.choice(sorted(pids)), signal.SIGKILL)


def freeze(fleet, slave, rng):
    """SIGSTOP of slave.py and all that it runs, SIGCONT at the end."""
    pids = processes_below(slave.folder)
    for pid in pids:
        kill(pid, signal.SIGSTOP)

    def thaw():
        for pid in pids:
            kill(pid, signal.SIGCONT)
    return thaw


def stop_cleanly(fleet, slave, rng):
    """SIGTERM, as a reboot does."""
    process = slave.process  # another fault may start a new one before the end of this
    kill(process.pid, signal.SIGTERM)

    def start_again():
        for pid in processes_below(slave.folder):
            kill(pid, signal.SIGCONT)  # a freeze may have come in between
        process.wait(20)
        restart(slave)
    return start_again


def fill_disk(fleet, slave, rng):
    """The small disk is full, but for a few kilobytes at times."""
    disk = fleet.slaves[0].disk
    if disk is None:
        return None
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as handle:
        while True:
            handle.write(b"x" * 4096)
    if rng.random() < 0.5:
        os.truncate(str(filler), max(0, filler.stat().st_size - 16384))
    return lambda: filler.unlink() if filler.exists() else None


def jump_clock(fleet, slave, rng):
    """The slave's clock jumps by up to a day, there or back, and comes right at the end."""
    slave.clock.write_text(str(rng.uniform(-86400, 86400)))
    return lambda: slave.clock.write_text("0")


def edit_times(fleet, slave, rng):
    """slave.py is killed and its record moved ahead, as by a clock that was wrong."""
    slave.kill()
    path = slave.state / "site.json"
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text())
        for key in ("requested", "started", "finished"):
            if record.get(key):
                record[key] += 86400
        path.write_text(json.dumps(record))
    return lambda: restart(slave)


def break_record(fleet, slave, rng):
    """slave.py is killed and its record torn, emptied or overwritten: its promises are lost."""
    slave.kill()
    path = slave.state / "site.json"
    if path.exists():
        whole = path.read_bytes()
        path.write_bytes(rng.choice([*GARBAGE, whole[:len(whole) // 2], whole[:-1]]))
        slave.forgotten_until = time.time()
    return lambda: restart(slave)


def break_pack(fleet, slave, rng):
    """A pack, index or loose object of the live clone is cut short or has a byte changed."""
    objects = slave.tree / ".git" / "objects"
    files = sorted(path for path in objects.glob("*/*") if path.is_file())
    if not files:
        return
    path = rng.choice(files)
    with contextlib.suppress(OSError):
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 0x55
        if rng.random() < 0.5:
            del data[at:]
        path.unlink()  # a file of its own: a tree that shares it by a hard link isn't hit
        path.write_bytes(bytes(data))


def leave_rubbish(fleet, slave, rng):
    """What a crash long ago might have left: half a clone, locks of git's own."""
    with contextlib.suppress(OSError):
        rubbish = slave.state / "site.new" / "objects"
        rubbish.mkdir(parents=True)
        (rubbish / "half").write_bytes(b"x" * 1000)
    with contextlib.suppress(OSError):
        (slave.tree / ".git" / "index.lock").write_bytes(b"")
        (slave.tree / ".git" / "shallow.lock").write_bytes(b"")


# -- what other programs of the host do -----------------------------------------------------------


def mount_volume(fleet, slave, rng):
    """A volume is bind-mounted in the live tree."""
    if not fleet.has_small_disk:
        return None
    place = slave.tree / VOLUME
    with contextlib.suppress(OSError):
        place.mkdir()
    command = ["mount", "--bind", str(slave.volume), str(place)]
    if subprocess.call(command, stderr=subprocess.DEVNULL):
        return None  # the tree was exchanged at this moment
    return slave.unmount_volume


def own_files(fleet, slave, rng):
    """Another user's files in the live tree, as a container writes them.

    Where the slave may not remove them, they become the slave's later, for its next run to remove.
    """
    if not fleet.is_root:
        return None
    theirs = slave.tree / "__pycache__"
    with contextlib.suppress(OSError):
        theirs.mkdir()
        (theirs / "module.pyc").write_bytes(b"x" * 100)
        for path in (theirs / "module.pyc", theirs):
            os.chown(str(path), OTHER_USER, OTHER_USER)
    return lambda: give_back(slave)


def give_back(slave):
    """Nothing is another user's any more."""
    for folder, folders, files in os.walk(str(slave.repos)):
        for path in [os.path.join(folder, name) for name in folders + files]:
            with contextlib.suppress(OSError):
                if os.lstat(path).st_uid == OTHER_USER:
                    os.lchown(path, 0, 0)


def hide_record(fleet, slave, rng):
    """slave.py starts while its record can't be read; later it can be, and it starts again."""
    if not slave.minds_rights:
        return None
    slave.kill()
    with contextlib.suppress(OSError):
        os.chown(str(slave.state / "site.json"), OTHER_USER, OTHER_USER)
        os.chmod(str(slave.state / "site.json"), 0o600)
    slave.start(wait=False)

    def mend():
        give_back(slave)
        if slave.process.poll() is None:
            slave.kill()
        restart(slave)
    return mend


def remove_state(fleet, slave, rng):
    """The state folder is gone from one moment to the next, and with it what it promised."""
    gone = slave.repos.parent / "gone"
    with contextlib.suppress(OSError):
        slave.state.rename(gone)
        slave.forgotten_until = time.time()
    shutil.rmtree(str(gone), ignore_errors=True)


def limit_files(fleet, slave, rng):
    """slave.py may open few files from now on, for a while."""
    pid = slave.process.pid
    with contextlib.suppress(OSError):
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(soft, FEW_FILES), hard))

        def mend():
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        return mend
    return None


# -- faults of the network and of the upstream ----------------------------------------------------


def cut_network(fleet, slave, rng):
    """Between master and slave: resets, silence, delays, truncation, duplicates."""
    delay, cut = "delay:%.1f" % rng.uniform(0.2, 2), "cut:%d" % rng.randrange(1, 400)
    slave.proxy.mode = rng.choice(["reset", "blackhole", "double", delay, cut])

    def mend():
        slave.proxy.mode = None
    return mend


def break_upstream(fleet, slave, rng):
    """Upstream is down, hangs, is slow, answers rubbish or cuts transfers, for all slaves."""
    cut, slow = "cut:%d" % rng.randrange(1, 3000), "slow:%d" % rng.randrange(500, 20000)
    fleet.http.fault = rng.choice(["reset", "hang", "503", "garbage", cut, slow])

    def mend():
        fleet.http.fault = None
    return mend


def fail_in_passing(fleet, slave, rng):
    """One of upstream's answers is a 503 or a reset; asked again, it is as ever."""
    number = len(fleet.http.requests) + rng.randrange(1, 7)
    fleet.http.faults_at[number] = rng.choice(["503", "reset"])


def reset_clients(fleet, slave, rng):
    """A hundred connections that are reset: at once, within a request, before the answer."""
    for number in range(100):
        with contextlib.suppress(OSError), socket.socket() as client:
            client.settimeout(2)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.connect(("127.0.0.1", slave.port))
            client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n"[:number % 30])


def force_push(fleet, slave, rng):
    """Upstream's history is replaced by another."""
    fleet.history.push(force=True)


def push(fleet, slave, rng):
    """A commit is pushed in the middle of it all."""
    fleet.history.push(rng.choice(["main", "main", "side"]))


def burst(fleet, slave, rng):
    """Thirty signals at one slave, some for other refs, by somebody who isn't the master."""
    for _ in range(30):
        if not ask(slave, rng.choice(["", "", "&ref=side", "&ref=" + fleet.history.head()])):
            return


def ask(slave, ref=""):
    """One signal, not by way of the proxy; False where the slave is down, dying or frozen."""
    asked = time.time()
    try:
        status, _, body = slave.get("/?repo=site" + ref, timeout=2)
    except (OSError, http.client.HTTPException):
        return False
    if status == 202:
        slave.heard.append((asked, json.loads(body.decode())["update"]))
    return True


FAULTS = {fault.__name__: fault for fault in (
    kill_slave, kill_everything, kill_a_child, freeze, stop_cleanly, fill_disk, jump_clock,
    edit_times, break_record, break_pack, leave_rubbish, mount_volume, own_files, cut_network,
    break_upstream, fail_in_passing, force_push, push, burst, hide_record, remove_state,
    limit_files, reset_clients)}
# Of a master, dealt with by the round that runs it.
MASTER_FAULTS = ("none", "none", "interrupt", "kill", "second with another ref")


def make_schedule(seed, slaves, events, spread_s):
    """The events of a round, in order: a pure function of its arguments."""
    rng = random.Random(seed)
    kinds = sorted(FAULTS)
    plan = [Event(round(rng.uniform(0, spread_s), 3), rng.choice(kinds), rng.randrange(slaves),
                  round(rng.uniform(0.1, 2), 3), rng.randrange(2 ** 32))
            for _ in range(events)]
    return rng.choice(MASTER_FAULTS), sorted(plan)
