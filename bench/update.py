#!/usr/bin/env python3
"""One slave's update, beside what people do instead: time, CPU, wire, disk, what a reader sees.

    update.py --work DIR --results DIR [--rounds N] [--all] [--quick | --upstream BARE_REPOSITORY]

Contestants take turns: in each round upstream gets its commit, everything is flushed to disk, and
each brings its own clone up to date. A last round, not timed, watches tree, disk and memory.
"""

import os
import shutil
import sys

import measure
import upstream

SITUATIONS = {"unchanged": 0, "one small commit": 1, "1,000 changed files": 1000}
LIMIT = "the limit"
OURS = "slave-activate"
FIRST = "slave-activate, first clone"

# Each is a script for sh -e, with URL (the repository), LIVE (the folder to bring up to date), DIR
# (what LIVE is in, for the contestant alone) and ROOT (our scripts).
GIT_SYNC = """
new=$(git ls-remote -q "$URL" HEAD | cut -f 1) old=$(readlink "$LIVE" || :)
[ "$old" != "tree-$new" ] || exit 0
git -C "$DIR/store" fetch -q "$URL" HEAD
git -C "$DIR/store" worktree add -q --force --detach "$DIR/tree-$new" "$new"
ln -s "tree-$new" "$DIR/link"; mv -T "$DIR/link" "$LIVE"
[ -z "$old" ] || git -C "$DIR/store" worktree remove --force "$DIR/$old"
"""
ANSIBLE = """
exec ansible localhost -m git -a "repo=$URL dest=$LIVE version=main force=yes recursive=no"
"""
ACTIVATE = 'exec "$ROOT/slave-activate" "${LIVE##*/}"'
UPDATES = {
    OURS: ACTIVATE,
    FIRST: ACTIVATE,
    "rm -rf && git clone": 'rm -rf "$LIVE"; exec git clone -q "$URL" "$LIVE"',
    "rm -rf && git clone --depth 1": 'rm -rf "$LIVE"; exec git clone -q --depth 1 "$URL" "$LIVE"',
    "git pull": 'exec git -C "$LIVE" pull -q',
    "fetch, worktree add, symlink (git-sync)": GIT_SYNC,
    "ansible -m git": ANSIBLE,
    LIMIT: 'git ls-remote -q "$URL" HEAD; git -C "$LIVE" checkout-index -a --prefix="$DIR/empty/"',
}
ALIKE = ["rm -rf && git clone", "rm -rf && git clone --depth 1", LIMIT]
GROWTH = [OURS, "rm -rf && git clone", "git pull", LIMIT]
# what a contestant starts from, where that is not its own first clone
SETUP = 'git clone -q "$BARE" "$LIVE"; git -C "$LIVE" remote set-url origin "$URL"'
SETUPS = {
    OURS: ACTIVATE,
    FIRST: "",  # nothing, also before each of its runs, see prepare
    "fetch, worktree add, symlink (git-sync)": 'git clone -q --bare "$BARE" "$DIR/store"'
    + GIT_SYNC,
}
MANY_FILES = "files-50000"  # all situations and contestants are with --all
# further points of the curves
CURVES = (
    ("files-500", ("files",)),
    ("files-5000", ("files", "objects")),
)
ALIKE_NOTE = (
    "What a whole clone costs, and the limit, does not depend on what changed: those rows are "
    "measured with one small commit."
)


class Contest:
    """The contestants' folders for one upstream repository."""

    def __init__(self, args, server, kind, products=None):
        """products: where a contestant's own version of our scripts is (measure.PRODUCT)."""
        self.work, self.server, self.kind = args.work, server, kind
        self.rounds = 1 if args.quick else args.rounds
        self.products = products or {}
        self.bare = os.path.join(args.work, "upstream", kind + ".git")
        self.url = f"{server.url}/{kind}.git"

    def folder(self, who):
        return os.path.join(self.work, "clones", self.kind, "".join(filter(str.isalnum, who)))

    def live(self, who):
        return os.path.join(self.folder(who), self.kind)

    def environment(self, who):
        keep = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        return dict(
            keep,
            HOME=os.path.join(self.work, "home"),
            URL=self.url,
            LIVE=self.live(who),
            DIR=self.folder(who),
            ROOT=self.products.get(who, measure.PRODUCT),
            BARE=self.bare,
            GIT_CONFIG_NOSYSTEM="1",
            SERVER_UPDATE_BASE_URL=self.server.url,
            SERVER_UPDATE_REPOS_DIR=self.folder(who),
            SERVER_UPDATE_SUBMODULES="no",  # as the others do
            SERVER_UPDATE_HOOKS_DIR=self.work,
        )

    def sh(self, who, script, started=None):
        """Runs the contestant's script; what it took, bytes over the wire (in MB) included."""
        argv = ("sh", "-ec", script)
        before = self.server.sent()
        values = measure.run_measured(argv, self.environment(who), self.work, started)
        values["wire"] = (self.server.sent() - before) / 1e6
        return values

    def empty(self, who):
        shutil.rmtree(self.folder(who), ignore_errors=True)
        os.makedirs(self.folder(who))

    def set_up(self, who):
        self.empty(who)
        self.sh(who, SETUPS.get(who, SETUP))

    def prepare(self, who):
        """Outside the measured time: what a run needs to be like the others."""
        if who == FIRST:
            self.empty(who)
        if who == LIMIT:
            shutil.rmtree(os.path.join(self.folder(who), "empty"), ignore_errors=True)
            self.sh(who, UPDATES["git pull"])
        os.sync()

    def check(self, who, commit):
        """Raises Failed unless the contestant's tree is at that commit, whole."""
        if who == LIMIT:
            return
        texts = []
        for name in (upstream.FIRST, upstream.LAST):
            with open(os.path.join(self.live(who), name), encoding="ascii") as handle:
                texts.append(handle.read())
        if upstream.run_git(self.live(who), "rev-parse", "HEAD") != commit or texts[0] != texts[1]:
            raise measure.Failed(f"{who}: {self.live(who)} is not at {commit}: {texts}")

    def take_turns(self, group, whos, changed):
        """The timed rounds, and a watched one.

        A peer that fails is left out from there on; ours ends it all.
        """
        whos = list(whos)
        for number in range(self.rounds + 1):
            commit = (
                upstream.commit(self.bare, changed)
                if changed
                else upstream.run_git(self.bare, "rev-parse", "main")
            )
            for who in measure.in_turn(whos, number):
                try:
                    measure.Results.add(group, who, self.run(who, number == self.rounds))
                    self.check(who, commit)
                except measure.Failed as error:
                    if who == OURS:
                        raise
                    measure.skip(who, error)
                    whos.remove(who)
        measure.Results.sort(group, list(UPDATES))

    def run(self, who, is_watched):
        """One run's values."""
        self.prepare(who)
        if is_watched:
            return self.watch(who, UPDATES[who])
        return self.sh(who, UPDATES[who])

    def watch(self, who, script):
        watcher = measure.Watcher(self.live(who), upstream.FIRST, upstream.LAST)
        watcher.start()
        self.sh(who, script, watcher.follow)
        seen = watcher.stop()
        if who in (FIRST, LIMIT):
            del seen["broken"]
        return seen


def contestants(situation=None):
    """All who take part in a situation; what is alike in all of them, only in one."""
    whos = [who for who in UPDATES if who != "ansible -m git" or shutil.which("ansible")]
    once = [FIRST, *ALIKE]
    return [who for who in whos if situation in (None, "one small commit") or who not in once]


def borrow(groups):
    """Adds to the other situations the rows that were measured once, with one small commit."""
    for group in groups:
        if group["situation"] != "one small commit":
            small = next(other for other in groups if other["situation"] == "one small commit")
            group["results"] += [result for result in small["results"] if result["who"] in ALIKE]
            measure.Results.sort(group, list(UPDATES))


def measure_updates(contest, results, title, situations, plot):
    """A table for each of the situations."""
    for who in contestants():
        contest.set_up(who)
    groups = []
    for situation in situations:
        group = results.group(
            f"{title}: {situation}",
            OURS,
            kind=contest.kind,
            situation=situation,
            note="" if situation == "one small commit" else ALIKE_NOTE,
        )
        if situation == "one small commit":
            group["plot"] = plot
        contest.take_turns(group, contestants(situation), SITUATIONS[situation])
        groups.append(group)
    borrow(groups)
    shutil.rmtree(os.path.join(contest.work, "clones", contest.kind))


def measure_growth(contest, results, title, plot):
    """One point of the curves: an update by one small commit."""
    for who in GROWTH:
        contest.set_up(who)
    situation = "one small commit"
    facts = {"plot": plot, "kind": contest.kind, "situation": situation}
    group = results.group(f"{title}: {situation}", OURS, **facts)
    contest.take_turns(group, GROWTH, 1)
    shutil.rmtree(os.path.join(contest.work, "clones", contest.kind))


def facts(bare):
    """How many files, objects and MB of packs a bare repository has."""
    count = dict(
        line.split(": ") for line in upstream.run_git(bare, "count-objects", "-v").splitlines()
    )
    files = len(upstream.run_git(bare, "ls-tree", "-r", "--name-only", "main").splitlines())
    return files, int(count["in-pack"]) + int(count["count"]), int(count["size-pack"]) / 1000


def describe(name, bare):
    files, objects, size = facts(bare)
    return f"{name} ({files:,} files, {objects:,} objects, {size:,.1f} MB)"


def make_upstream(args, kind):
    bare = os.path.join(args.work, "upstream", kind + ".git")
    print(f"bench: making the repository {kind}", flush=True)
    upstream.make(kind, bare)
    return bare


def measure_all(args, server, results):
    situations = list(SITUATIONS)
    rows = [
        ("tiny", "A tiny repository", situations[:2]),
        ("middle", "A middle repository", situations if args.all else situations[:2]),
    ]
    curves = [*CURVES, (MANY_FILES, ("files",))]
    if args.all:
        rows.append((MANY_FILES, "A repository of many files", situations))
        curves.pop()
    if args.quick:
        rows = [("smoke", "A repository for a quick look", situations[:2])]
    for kind, name, which in rows:
        bare = make_upstream(args, kind)
        files, objects, _ = facts(bare)
        plot = {"objects": objects} if kind == "middle" else {"files": files}
        contest, title = Contest(args, server, kind), describe(name, bare)
        measure_updates(contest, results, title, which, plot)
    for kind, axes in () if args.quick else curves:
        bare = make_upstream(args, kind)
        numbers = dict(zip(("files", "objects"), facts(bare)))
        plot = {axis: numbers[axis] for axis in axes}
        measure_growth(Contest(args, server, kind), results, describe(kind, bare), plot)


def measure_given(args, server, results):
    """The tables of the repository that somebody has."""
    bare = os.path.join(args.work, "upstream", "given.git")
    upstream.adopt(args.upstream, bare)
    title = describe("The repository given with --upstream", bare)
    plot = {"objects": facts(bare)[1]}
    contest = Contest(args, server, "given")
    measure_updates(contest, results, title, list(SITUATIONS)[:2], plot)


def main(argv):
    parser = measure.parser(__doc__)
    parser.add_argument("--upstream")
    args = parser.parse_args(argv)
    os.makedirs(os.path.join(args.work, "home"), exist_ok=True)
    os.makedirs(os.path.join(args.work, "upstream"), exist_ok=True)
    server = upstream.Server(os.path.join(args.work, "upstream"))
    row, measure_it = ("given", measure_given) if args.upstream else ("update", measure_all)
    try:
        with measure.kept_results(row, args.results) as results:
            measure_it(args, server, results)
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
