#!/usr/bin/env python3
"""From `git push` to 20 real slaves that a relay has updated, beside the same by hand.

    push.py --work DIR --results DIR [--quick] [--rounds N]

By a relay: from the start of `git push`, whose post-receive hook sends what GitHub sends, until
the relay tells that it and all beneath it are live. By hand: slave-activate where the relay is,
then server-update to the same slaves; the push before it is not measured. Each run brings a commit
of its own. At the end one more slave is in the list, a dead one, which has to be told.
"""

import hashlib
import hmac
import http.client
import json
import os
import secrets
import subprocess
import sys
import time

import fleet
import measure
import upstream

SLAVES = 20
RELAYED, BY_HAND = "git push, a relay does the rest", "slave-activate, then server-update"
DEAD = "127.0.0.1:1"
FOLLOW_S = 300
# What a forge does at a push: {key}, {port} and {repo} are those of the relay's hook.
POST_RECEIVE = """#!{python} -IS
import hmac, http.client, json, sys
before, after, ref = sys.stdin.read().split()
told = {{"ref": ref, "before": before, "after": after, "repository": {{"default_branch": "main"}}}}
body = json.dumps(told).encode()
mac = hmac.new(b"{key}", body, "sha256").hexdigest()
headers = {{"X-GitHub-Event": "push", "X-Hub-Signature-256": "sha256=" + mac}}
relay = http.client.HTTPConnection("127.0.0.1", {port})
relay.request("POST", "/hook?repo={repo}", body, headers)
with open("answer", "wb") as answer:
    answer.write(relay.getresponse().read())
"""


class Relay:
    """A relay above a fleet's slaves, all with one secret, and who pushes to its upstream."""

    def __init__(self, slaves):
        self.slaves = slaves
        self.author = os.path.join(slaves.work, "author.git")
        self.secret = secrets.token_hex(32)
        self.secret_file = os.path.join(slaves.work, "secret")
        self.port = None

    def start(self):
        """Starts the slaves and the relay; the upstream tells the relay of each push."""
        os.makedirs(self.slaves.work)
        with open(os.open(self.secret_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
            handle.write(self.secret + "\n")
        self.slaves.start(SECRET_FILE=self.secret_file)
        settings = {"SECRET_FILE": self.secret_file, "SLAVELIST": self.slaves.list}
        self.port = self.slaves.start_slave("relay", **settings)
        run_git = upstream.run_git
        run_git(".", "clone", "-q", "--bare", self.slaves.bare, self.author)
        text = "server-update-hook-1\n%s\n" % self.slaves.kind
        key = hmac.new(self.secret.encode(), text.encode(), hashlib.sha256).hexdigest()
        hook = os.path.join(self.slaves.bare, "hooks", "post-receive")
        facts = {"python": sys.executable, "port": self.port, "repo": self.slaves.kind}
        os.makedirs(os.path.dirname(hook), exist_ok=True)
        with open(hook, "w", encoding="ascii") as handle:
            handle.write(POST_RECEIVE.format(key=key, **facts))
        os.chmod(hook, 0o755)

    def sign(self, target):
        """The header of a request, as docs/security.md has it."""
        now, nonce = str(int(time.time())), secrets.token_hex(16)
        text = "\n".join(("server-update-1", "GET", target, now, nonce)).encode()
        mac = hmac.new(self.secret.encode(), text, hashlib.sha256).hexdigest()
        return {"X-Server-Update-Signature": f"t={now},n={nonce},s={mac}"}

    def ask(self, target):
        """The relay's answer to a signed GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=FOLLOW_S)
        connection.request("GET", target, headers=self.sign(target))
        found = json.loads(connection.getresponse().read())
        connection.close()
        return found

    def push(self):
        """Pushes the author's newest commit and waits for its end: the relay's record."""
        subprocess.run(("git", "-C", self.author, "push", "-q", self.slaves.bare, "main"),
                       check=True)
        with open(os.path.join(self.slaves.bare, "answer"), "rb") as answer:
            asked = json.loads(answer.read())
        target = f"/status?repo={self.slaves.kind}&update={asked['update']}&wait=30"
        record = self.ask(target)
        while record["state"] in ("queued", "running"):
            record = self.ask(target)
        return record

    def update_by_hand(self):
        """slave-activate where the relay is, then server-update to those beneath."""
        update = [*self.slaves.commands()[fleet.OURS], "--secret-file", self.secret_file]
        activate = os.path.join(measure.PRODUCT, "slave-activate")
        measure.run_measured([activate, self.slaves.kind], self.slaves.settings_of("relay"))
        measure.run_measured(update, self.slaves.environment())

    def status_of_who_follows(self):
        """The exit status of server-update, followed to the end, with the relay alone in its list.
        """
        program = os.path.join(measure.PRODUCT, "server-update")
        argv = [sys.executable, program, "--list", "-", "--secret-file", self.secret_file]
        entry = f"127.0.0.1:{self.port}\n".encode()
        done = subprocess.run(
            [*argv, "-q", self.slaves.kind], input=entry, env=self.slaves.environment(),
            stdout=subprocess.DEVNULL, check=False,
        )
        return done.returncode


def check(relay, record, beneath):
    """Raises Failed unless the record has just this beneath, told as state and message."""
    if (record["state"], record["beneath"]) != ("live", beneath):
        raise measure.Failed(f"the relay's record: {record}")


def take_turns(relay, group, rounds):
    """Pairs: each contestant brings a commit of its own, and begins every other time."""
    slaves = relay.slaves
    everyone = {"live": slaves.slaves}
    upstream.commit(relay.author, 1)
    check(relay, relay.push(), everyone)  # the first clones
    for number in range(rounds):
        for who in measure.in_turn([RELAYED, BY_HAND], number):
            commit = upstream.commit(relay.author, 1)
            if who == BY_HAND:  # fetched: no hook tells anybody
                upstream.run_git(slaves.bare, "fetch", "-q", relay.author, "main:main")
            os.sync()
            before = time.monotonic()
            if who == RELAYED:
                check(relay, relay.push(), everyone)
            else:
                relay.update_by_hand()
            measure.Results.add(group, who, {"seconds": time.monotonic() - before})
            slaves.check(fleet.OURS, commit)
    measure.Results.sort(group, [RELAYED, BY_HAND])


def check_dead(relay):
    """Raises Failed unless a dead slave is told in the record and to who follows."""
    with open(relay.slaves.list, "a", encoding="ascii") as handle:
        handle.write(DEAD + "\n")
    upstream.commit(relay.author, 1)
    record = relay.push()
    check(relay, record, {"live": relay.slaves.slaves, "unreachable": 1})
    told = relay.ask(f"/status?repo={relay.slaves.kind}")["beneath_bad"]
    if [bad["slave"] for bad in told] != [DEAD]:
        raise measure.Failed(f"who is dead: {told}")
    status = relay.status_of_who_follows()
    if status != 1:
        raise measure.Failed(f"who followed the relay had exit status {status}")


def main(argv):
    args = measure.parser(__doc__).parse_args(argv)
    base = os.path.join(args.work, "upstream")
    os.makedirs(base, exist_ok=True)
    server = upstream.Server(base)
    slaves = fleet.Fleet(args, server, None, SLAVES)
    relay = Relay(slaves)
    title = f"From a push to a relay and {slaves.slaves} real slaves beneath it, one small commit"
    facts = {"kind": "push", "situation": "one small commit"}
    try:
        with measure.kept_results("push", args.results) as results:
            upstream.make(slaves.kind, slaves.bare)
            relay.start()
            group = results.group(title, RELAYED, **facts)
            take_turns(relay, group, 1 if args.quick else args.rounds)
            check_dead(relay)
    finally:
        slaves.stop()
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
