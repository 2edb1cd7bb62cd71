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
TELL_S = 30
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


# What the relay's update-ended is called with, a line an update.
UPDATE_ENDED = """#!/bin/sh
echo "$*" >>'{told}'
"""


def write_hook(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as handle:
        handle.write(text)
    os.chmod(path, 0o755)


def read(path):
    with open(path, encoding="utf-8") as handle:
        return handle.read()


class Relay:
    """A relay above a fleet's slaves, all with one secret, and who pushes to its upstream."""

    def __init__(self, slaves):
        self.slaves = slaves
        self.author = os.path.join(slaves.work, "author.git")
        self.secret = secrets.token_hex(32)
        self.secret_file = os.path.join(slaves.work, "secret")
        self.told = os.path.join(slaves.work, "told")
        self.port = None

    def start(self):
        """Starts the slaves and the relay; the upstream tells the relay of each push."""
        os.makedirs(self.slaves.work)
        with open(os.open(self.secret_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as handle:
            handle.write(self.secret + "\n")
        self.slaves.start(SECRET_FILE=self.secret_file)
        hooks = os.path.join(self.slaves.work, "relay-hooks")
        write_hook(os.path.join(hooks, "update-ended"), UPDATE_ENDED.format(told=self.told))
        settings = {"SECRET_FILE": self.secret_file, "SLAVELIST": self.slaves.list}
        self.port = self.slaves.start_slave("relay", HOOKS_DIR=hooks, **settings)
        upstream.run_git(".", "clone", "-q", "--bare", self.slaves.bare, self.author)
        text = "server-update-hook-1\n%s\n" % self.slaves.kind
        key = hmac.new(self.secret.encode(), text.encode(), hashlib.sha256).hexdigest()
        hook = os.path.join(self.slaves.bare, "hooks", "post-receive")
        facts = {"python": sys.executable, "port": self.port, "repo": self.slaves.kind}
        write_hook(hook, POST_RECEIVE.format(key=key, **facts))

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
    """Raises Failed unless a dead slave is told in the record, by update-ended, to who follows."""
    with open(relay.slaves.list, "a", encoding="ascii") as handle:
        handle.write(DEAD + "\n")
    upstream.commit(relay.author, 1)
    record = relay.push()
    check(relay, record, {"live": relay.slaves.slaves, "unreachable": 1})
    told = relay.ask(f"/status?repo={relay.slaves.kind}")["beneath_bad"]
    if [bad["slave"] for bad in told] != [DEAD]:
        raise measure.Failed(f"who is dead: {told}")
    end = time.monotonic() + TELL_S
    while DEAD not in read(relay.told):
        if time.monotonic() > end:
            raise measure.Failed(f"update-ended was called with {read(relay.told)}")
        time.sleep(0.01)
    status = relay.status_of_who_follows()
    if status != 1:
        raise measure.Failed(f"who followed the relay had exit status {status}")


def main(argv):
    args = measure.parser(__doc__).parse_args(argv)
    facts = {"kind": "push", "situation": "one small commit"}
    with measure.kept_results("push", args.results) as results:
        with fleet.with_upstream(args, SLAVES) as slaves:
            title = f"From a push to a relay and {slaves.slaves} real slaves beneath it"
            relay = Relay(slaves)
            relay.start()
            group = results.group(f"{title}, one small commit", RELAYED, **facts)
            take_turns(relay, group, 1 if args.quick else args.rounds)
            check_dead(relay)


if __name__ == "__main__":
    main(sys.argv[1:])
