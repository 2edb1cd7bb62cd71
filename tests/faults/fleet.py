"""A fleet for the fault suite: one upstream over HTTP, slaves behind proxies, masters."""
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

from processes import kill_all_below
from product import ISOLATED, SOURCES, copy_scripts, with_no_rights
from proxy import Proxy, ProxyLoop
from slave_support import Slave, stop_for_good
from upstream import HttpUpstream, Upstream

HERE = Path(__file__).resolve().parent
REPO = "site"
VOLUME = "uploads"  # in the live tree
FEW_FILES = 40
SMALL_DISK_BYTES = 4 * 1024 * 1024
MASTER_OPTIONS = ["--json", "--timeout", "12", "--connect-timeout", "1", "--retries", "1"]
CLEAN_OPTIONS = ["--json", "--timeout", "40"]
# The hooks keep the checker's journal: what was put live, and whether two updates overlapped. What
# runs is named by its process, as an update that is stopped half-way never gets to post-update.
PRE_UPDATE = """#!/bin/sh
began() {{
    cut -d' ' -f2,3,22 "/proc/$1/stat" 2>/dev/null | sed -n 's/^(slave-activate) [^ZX] //p'
}}
pid='' time=''
[ ! -e '{folder}/running' ] || read -r pid time <'{folder}/running'
[ -z "$time" ] || [ "$(began "$pid")" != "$time" ] || echo 'overlap' >>'{folder}/journal'
echo "$PPID $(began "$PPID")" >'{folder}/running'
"""
POST_UPDATE = """#!/bin/sh
echo "$1 $3 $2" >>'{folder}/journal'
rm -f '{folder}/running'
"""


class History:
    """What the upstream has had: every commit pushed, in order; each version's files agree."""

    def __init__(self, upstream):
        self.repo = upstream.create(REPO, {})
        self.pushed = []  # (commit, branch), in the order of the pushes
        self.pushed_at = []  # when each of them was done
        self.version = 0

    def push(self, branch="main", force=False):
        """Push the next version; with force in place of all before it."""
        self.version += 1
        mark = "%d\n" % self.version
        files = {"first": mark, "second": mark, "deep/er/third": mark,
                 "many/%d" % self.version: mark * 50, "many/%d" % (self.version - 7): None}
        first = not any(name == branch for _, name in self.pushed)
        parent = "" if force else self.head() if first and self.pushed else None
        commit = self.repo.commit(files, "Version " + mark, branch, parent)
        self.pushed.append((commit, branch))
        self.pushed_at.append(time.time())
        return commit

    def head(self, branch="main"):
        """The newest commit of a branch."""
        return [commit for commit, name in self.pushed if name == branch][-1]

    def order(self, commit):
        """How many pushes came before that of the commit; None if there never was such a push."""
        found = [at for at, (pushed, _) in enumerate(self.pushed) if pushed == commit]
        return found[0] if found else None


class FleetSlave(Slave):
    """A slave with a journal, a proxy, a clock that can be wrong and maybe a small disk."""

    def __init__(self, folder, base_url, loop, small_disk=False, minds_rights=False,
                 max_files=None, sources=SOURCES, settings=None):
        folder.mkdir()
        self.folder, self.disk = folder, None
        self.minds_rights = minds_rights  # root has none of its powers there: rights hold for it
        settings = dict({"BASE_URL": base_url, "TIMEOUT": 20}, **(settings or {}))
        if small_disk:
            self.disk = folder / "disk"
            self.disk.mkdir()
            subprocess.check_call(["mount", "-t", "tmpfs", "-o", "size=%d" % SMALL_DISK_BYTES,
                                   "tmpfs", str(self.disk)])
            settings["REPOS_DIR"] = str(self.disk / "repos")
        super().__init__(folder, settings, sources=sources)
        self.tmp, self.clock = folder / "tmp", folder / "clock"
        self.tmp.mkdir()
        self.env["TMPDIR"] = str(self.tmp)
        self.command[-1:-1] = [str(HERE / "clock.py"), str(self.clock)]
        if minds_rights:
            self.command[:0] = with_no_rights()
        if max_files:
            limit = 'ulimit -n %d; exec "$@"' % max_files
            self.command[:0] = ["sh", "-c", limit, "sh"]
        self.volume = folder / "volume"  # is mounted in the live tree by a fault
        self.volume.mkdir()
        (self.volume / "precious").write_text("nobody's to remove\n")
        for name, text in (("pre-update", PRE_UPDATE), ("post-update", POST_UPDATE)):
            hook = self.hooks / name
            hook.write_text(text.format(folder=folder))
            hook.chmod(0o755)
        self.start()
        self.proxy = Proxy(loop, self.port)
        self.heard = []  # signals sent around the proxy: (when, update id)
        self.journal_before = 0  # lines, when this round began
        self.forgotten_until = 0  # earlier acceptances were lost with a record that a fault broke

    @property
    def tree(self):
        """The live clone."""
        return self.repos / REPO

    def journal(self):
        """The journal's lines: [repo, new, old] each."""
        path = self.folder / "journal"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def accepted(self):
        """Every update it has accepted: (when, update id)."""
        return sorted(self.proxy.accepted + self.heard)

    def close(self):
        """End it with all that belongs to it."""
        self.unmount_volume()
        self.proxy.close()
        stop_for_good(self)
        if self.disk:
            subprocess.call(["umount", "-l", str(self.disk)])


    def unmount_volume(self):
        """Take the volume away, wherever the tree that it was mounted in has gone meanwhile."""
        with open("/proc/self/mountinfo") as lines:
            places = [line.split()[4] for line in lines]
        for place in places:
            if place.startswith(str(self.folder) + "/") and place.endswith("/" + VOLUME):
                subprocess.call(["umount", "-l", place], stderr=subprocess.DEVNULL)


class Master:
    """One run of server-update --json, its lines read as they come."""

    def __init__(self, fleet, *options):
        self.fleet = fleet
        self.journal_before = {slave: len(slave.journal()) for slave in fleet.slaves}
        self.results = []  # (result, journal lines from the start until it was told)
        self.summary = self.torn = None
        self.process = subprocess.Popen(
            [*ISOLATED, str(fleet.bin / "server-update"), "--list", str(fleet.slavelist),
             *options, REPO], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, universal_newlines=True, start_new_session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for text in self.process.stdout:
            try:
                line = json.loads(text)
            except ValueError:
                self.torn = text
                continue
            if line["type"] == "result":
                slave = self.fleet.by_entry[line["slave"]]
                journal = slave.journal()[self.journal_before[slave]:]
                self.results.append((line, journal))
            elif line["type"] == "summary":
                self.summary = line

    def wait(self, timeout=300):
        """Wait for its end; the exit status."""
        status = self.process.wait(timeout)
        self.reader.join(10)
        self.process.stdout.close()
        self.errors = self.process.stderr.read()
        self.process.stderr.close()
        return status


class Fleet:
    """`size` slaves behind proxies, an upstream with a history, a place for masters."""

    def __init__(self, folder, size, sources=SOURCES):
        self.folder = Path(folder)
        self.upstream = Upstream(self.folder / "upstream")
        self.http = HttpUpstream(self.upstream)
        self.history = History(self.upstream)
        self.history.push()
        self.history.push("side")
        self.loop = ProxyLoop()
        self.bin = copy_scripts(sources, self.folder / "master", "server-update")
        self.slaves = []
        self.is_root = os.getuid() == 0 and shutil.which("setpriv") is not None
        self.has_small_disk = self.is_root and shutil.which("mount") is not None
        for number in range(size):
            self.slaves.append(FleetSlave(
                self.folder / ("slave-%02d" % number), self.http.url, self.loop,
                small_disk=self.has_small_disk and number == 0,
                minds_rights=self.is_root and number % 3 == 1,
                max_files=FEW_FILES if number == 2 else None, sources=sources))
        self.by_entry = {slave.proxy.entry: slave for slave in self.slaves}
        self.slavelist = self.folder / "slavelist.txt"
        self.slavelist.write_text("".join(entry + "\n" for entry in self.by_entry))

    def master(self, *options):
        """Start a master under faults."""
        return Master(self, *MASTER_OPTIONS, *options)

    def clean_run(self, *options):
        """A master's whole run with no faults about."""
        master = Master(self, *CLEAN_OPTIONS, *options)
        master.wait(90)
        return master

    def close(self):
        """End everything, whatever state it is in."""
        for slave in self.slaves:
            slave.close()
        self.loop.close()
        self.http.close()
        kill_all_below(self.folder)
