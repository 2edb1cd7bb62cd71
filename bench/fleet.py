#!/usr/bin/env python3
"""A whole update followed to its end on real slaves on this machine, beside ansible and pdsh.

    fleet.py --work DIR --results DIR [--quick] [--rounds N]

Every slave is a slave.py in a process of its own with a clone of its own; for the peers every
slave is a folder of its own behind an sshd. All of them work on the machine that is the master.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading

import measure
import sshd
import upstream

SLAVES = 50
OURS = "server-update"
KIND = "files-500"


class Fleet:
    """The slaves, their folders and the commands that update all of them."""

    def __init__(self, args, server, ssh, slaves=SLAVES, kind=KIND):
        self.work, self.server, self.ssh = os.path.join(args.work, "fleet"), server, ssh
        self.slaves = 2 if args.quick else slaves
        self.kind = "smoke" if args.quick else kind
        self.base, self.url = server.url, f"{server.url}/{self.kind}.git"
        self.bare = os.path.join(args.work, "upstream", self.kind + ".git")
        self.processes = []
        self.list = os.path.join(self.work, "slavelist.txt")
        self.names = [f"slave{number}" for number in range(1, self.slaves + 1)]

    def environment(self):
        keep = {
            "PATH": os.environ["PATH"],
            "HOME": os.path.join(self.work, "home"),
            "GIT_CONFIG_NOSYSTEM": "1",
            "ANSIBLE_HOST_KEY_CHECKING": "False",
        }
        return dict(keep, **(self.ssh.environment() if self.ssh else {}))

    def settings_of(self, name, **settings):
        """The environment that slave.py and slave-activate of that slave have."""
        own = {
            "BASE_URL": self.base,
            "BIND": "127.0.0.1",
            "PORT": "0",
            "REPOS_DIR": os.path.join(self.work, OURS, name),
            "HOOKS_DIR": self.work,
        }
        named = {f"SERVER_UPDATE_{key}": value for key, value in dict(own, **settings).items()}
        return dict(self.environment(), **named)

    def launch(self, name, **settings):
        """Begins to start a slave.py; its process."""
        process = subprocess.Popen(
            (sys.executable, "-I", os.path.join(measure.PRODUCT, "slave.py")),
            env=self.settings_of(name, **settings),
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def start_slave(self, name, **settings):
        """Starts a slave.py; its port."""
        return wait_until_up(self.launch(name, **settings))

    def start(self, **settings):
        """Starts every slave.py and writes the slave list with the ports they chose."""
        os.makedirs(os.path.join(self.work, "home"))
        processes = [self.launch(name, **settings) for name in self.names]
        ports = list(map(wait_until_up, processes))
        with open(self.list, "w", encoding="ascii") as handle:
            handle.writelines(f"127.0.0.1:{port}\n" for port in ports)

    def stop(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()

    def commands(self):
        """Who takes part, with the command that updates all slaves and waits for them."""
        found = {
            OURS: [
                sys.executable,
                os.path.join(measure.PRODUCT, "server-update"),
                "--list",
                self.list,
                "-q",
                self.kind,
            ]
        }
        hosts = ",".join(self.names)
        every = ["pdsh", "-S", "-f", str(self.slaves), "-w", hosts]
        pull = os.path.join(self.work, "pull", "%h", self.kind)
        ansible = os.path.join(self.work, "ansible", "{{inventory_hostname}}", self.kind)
        if self.ssh and shutil.which("pdsh"):
            found["pdsh git pull"] = [*every, f"git -C {pull} pull -q"]
        if self.ssh and shutil.which("ansible"):
            python = os.path.realpath(sys.executable)
            found["ansible -m git"] = [
                "ansible",
                "all",
                "-i",
                hosts + ",",
                "-f",
                str(self.slaves),
                "-e",
                f"ansible_python_interpreter={python}",
                "-m",
                "git",
                "-a",
                f"repo={self.url} dest={ansible} version=main force=yes",
            ]
        return found

    def folder(self, who):
        return {
            "pdsh git pull": "pull",
            "ansible -m git": "ansible",
        }.get(who, who)

    def set_up(self, who):
        """The first clones: the slaves make their own, the peers' are copied."""
        if who == OURS:
            measure.run_measured(self.commands()[OURS], self.environment())
            return
        for name in self.names:
            tree = os.path.join(self.work, self.folder(who), name, self.kind)
            subprocess.run(("git", "clone", "-q", self.bare, tree), check=True)
            upstream.run_git(tree, "remote", "set-url", "origin", self.url)

    def check(self, who, commit):
        """Raises measure.Failed unless each of the slaves has that commit."""
        for name in self.names:
            tree = os.path.join(self.work, self.folder(who), name, self.kind)
            if upstream.run_git(tree, "rev-parse", "HEAD") != commit:
                raise measure.Failed(f"{who}: {tree} is not at {commit}")


def read_port(process):
    """The port that a starting slave logs; raises measure.Failed with what it said instead."""
    said = b""
    for line in process.stderr:
        said += line
        found = re.search(rb"listening on port (\d+)", line)
        if found:
            return int(found.group(1))
    raise measure.Failed(f"slave.py did not start: {said.decode(errors='replace')}")


def wait_until_up(process):
    """The port of a slave that has just been started; what it logs later is not kept."""
    port = read_port(process)
    threading.Thread(target=drain, args=(process.stderr,), daemon=True).start()
    return port


def drain(stream):
    """The log has to go somewhere: a slave whose pipe is full would wait."""
    while stream.read1(65536):
        pass


def take_turns(fleet, group, rounds):
    commands = fleet.commands()
    for who in commands:
        fleet.set_up(who)
    whos = list(commands)
    for number in range(rounds):
        commit = upstream.commit(fleet.bare, 1)
        for who in measure.in_turn(whos, number):
            os.sync()
            measure.Results.add(
                group, who, measure.run_measured(commands[who], fleet.environment())
            )
            fleet.check(who, commit)
    measure.Results.sort(group, whos)


@contextlib.contextmanager
def with_upstream(args, slaves, kind=KIND):
    """So many slaves, which nobody has started yet, and their upstream; both end afterwards."""
    base = os.path.join(args.work, "upstream")
    os.makedirs(base, exist_ok=True)
    server = upstream.Server(base)
    fleet = Fleet(args, server, None, slaves, kind)
    try:
        upstream.make(fleet.kind, fleet.bare)
        yield fleet
    finally:
        fleet.stop()
        server.stop()


def main(argv):
    args = measure.parser(__doc__).parse_args(argv)
    base = os.path.join(args.work, "upstream")
    os.makedirs(base, exist_ok=True)
    server = upstream.Server(base)
    ssh = None if args.quick else sshd.start(os.path.join(args.work, "sshd"))
    fleet = Fleet(args, server, ssh)
    title = f"An update followed to its end on {fleet.slaves} real slaves, one small commit"
    try:
        with measure.kept_results("fleet", args.results) as results:
            if not os.path.exists(fleet.bare):
                upstream.make(fleet.kind, fleet.bare)
            fleet.start()
            take_turns(fleet, results.group(title, OURS), 1 if args.quick else args.rounds)
    finally:
        fleet.stop()
        server.stop()
        if ssh:
            ssh.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
