"""A hostile repository: an update writes nothing outside its tree and runs nothing of it.

What an attack would do is to make a file named `pwned` in a folder beside the home; a snapshot of
that folder, which must not change, is the proof. Where it is cheap, the same attack is let work.
"""

import os

import pytest
from activate_support import Activate, snapshot
from processes import cpu_s_of_children
from product import daily
from upstream import run_git

FILES = 64000
HUGE_BYTES = 64 << 20


class Attack:
    """Repository r, live through HTTP as it was before it turned hostile (`first`)."""

    def __init__(self, tmp_path, http_upstream):
        self.upstream = http_upstream
        self.outside = tmp_path / "outside"
        self.outside.mkdir()
        (self.outside / "theirs").write_text("theirs\n")
        self.pwned = self.outside / "pwned"
        self.run = "touch %s" % self.pwned
        self.plain = tmp_path / "plain"  # where a plain git clone shows that an attack works
        self.repo = http_upstream.create("r", {"f": "1"})
        self.url = http_upstream.url + "/r.git"
        self.activate = self.roomy = Activate(tmp_path, http_upstream.url)
        self.first = self.activate.good("r")[0]
        self.before = snapshot(self.outside), snapshot(self.activate.live())

    def harmless(self, commit, *args):
        """It goes live, and nothing else happens."""
        assert self.activate.good("r", *args)[0] == commit
        assert snapshot(self.outside) == self.before[0], os.listdir(str(self.outside))

    def refused(self):
        """The update fails and nothing else happens; the reason."""
        result = self.activate("r")
        assert (result.status, result.out, result.last[:16]) == (1, "", "slave-activate: "), result
        assert (snapshot(self.outside), snapshot(self.activate.live())) == self.before
        assert self.activate.leftovers() == []
        return result.last[16:]

    def move(self, disk):
        """Go on with a slave on a disk of its own, where the first commit is live."""
        self.activate = Activate(disk, self.upstream.url)
        self.activate.good("r")
        self.before = self.before[0], snapshot(self.activate.live())

    def move_back(self):
        self.activate = self.roomy

    def works(self):
        """The attack has worked, where it was let; undo it."""
        assert self.pwned.exists(), "this attack attacks nothing"
        self.pwned.unlink()
        self.before = snapshot(self.outside), self.before[1]

    def submodule(self, url, more="", name="sub", path="sub", **files):
        """Commit a submodule; the commit."""
        text = '[submodule "%s"]\n\tpath = %s\n\turl = %s\n%s' % (name, path, url, more)
        files.update({".gitmodules": text, path.strip('"'): ("160000", self.first)})
        return self.repo.commit(files)


@pytest.fixture
def attack(tmp_path, http_upstream):
    return Attack(tmp_path, http_upstream)


def allow(key, value="always"):
    """The environment in which git has that setting."""
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": key, "GIT_CONFIG_VALUE_0": value}


def tree(repo, *entries):
    """Write a tree of (mode, name, hash) as it is, whatever git thinks of it; its hash."""
    raw = b"".join(b"%s %s\0%s" % (*map(str.encode, e[:2]), bytes.fromhex(e[2])) for e in entries)
    return repo.git("hash-object", "-t", "tree", "--literally", "-w", "--stdin", text=raw)


def commit_tree(repo, *entries):
    """Make that tree the next commit; its hash."""
    commit = repo.git("commit-tree", "-m", "evil", "-p", "HEAD", tree(repo, *entries))
    repo.git("update-ref", "HEAD", commit)
    return commit


def blob(repo, text):
    return repo.git("hash-object", "-w", "--stdin", text=text)


def test_a_link_to_a_folder_outside_is_not_written_through(attack):
    link = ("120000", str(attack.outside))
    attack.harmless(attack.repo.commit({"out": link, "sub/theirs": ("120000", "../out/theirs")}))
    live = attack.activate.live()
    (live / "out/pwned").touch()  # as anything would that follows it
    attack.works()
    files = {"out": None, "out/pwned": "x", "out/theirs": "x", "sub/theirs": "x"}
    attack.harmless(attack.repo.commit(files))
    assert (live / "out/pwned").read_text() == (live / "sub/theirs").read_text() == "x"
    attack.harmless(attack.repo.commit({"out": link, "sub": link}))
    attack.harmless(attack.repo.commit({"out": None, "sub": None}))


def test_many_links_to_itself_cost_nothing(attack):
    """Of n links to the folder that they are in come n to the power of 3 paths of three names."""

    def price(files):
        before = cpu_s_of_children()
        attack.harmless(attack.repo.commit(files))
        return cpu_s_of_children() - before

    plain = price({"file-%d" % number: "." for number in range(300)})
    price({"link-%d" % number: ("120000", ".") for number in range(300)})
    assert price({"more": "1"}) < 10 * plain


@pytest.mark.parametrize("link_first", [True, False])
def test_a_link_and_a_folder_of_the_same_name(attack, link_first):
    repo = attack.repo
    link = ("120000", "out", blob(repo, str(attack.outside)))
    folder = ("40000", "out", tree(repo, ("100644", "pwned", blob(repo, "x"))))
    commit_tree(repo, *([link, folder] if link_first else [folder, link]))
    attack.harmless(repo.head())  # one of the two is there


@pytest.mark.parametrize(
    "path",  # "|" between a folder and what is in it
    [
        ".git|hooks|post-checkout",
        ".GIT|hooks|post-checkout",
        ".git |hooks|post-checkout",
        "git~1|hooks|post-checkout",
        "sub|.git|config",
        "../../../../outside/pwned",
        ".gitmodules",  # as a link
    ],
)
def test_paths_that_git_keeps_for_itself_are_refused(attack, path):
    *folders, name = path.split("|")
    mode = "120000" if name == ".gitmodules" else "100755"
    entry = (mode, name, blob(attack.repo, "#!/bin/sh\n%s\n" % attack.run))
    for folder in reversed(folders):
        entry = ("40000", folder, tree(attack.repo, entry))
    commit = commit_tree(attack.repo, entry)
    path = path.replace("|", "/")
    assert attack.repo.git("ls-tree", "-r", "--name-only", commit) == path
    assert attack.refused() == "invalid path '%s'" % path


def test_a_submodule_path_that_ends_in_a_return(attack):
    """CVE-2025-48384: git before July 2025 forgot the return and wrote through the link."""
    attack.first = attack.upstream.create("evil", {"pwned": "x"}).head()
    files = {"sub": ("120000", str(attack.outside))}
    attack.harmless(attack.submodule("../evil.git", path='"sub\r"', **files))
    live = attack.activate.live()
    assert (live / "sub\r/pwned").exists()
    run_git("--git-dir=.git/modules/sub", "--work-tree=sub", "checkout", "-f", cwd=str(live))
    attack.works()


@pytest.mark.parametrize("ref", daily(1, ["branch", "commit"]))
def test_hooks_in_the_tree_do_not_run(attack, own_home, ref):
    hooks = {
        folder + name: ("100755", "#!/bin/sh\n%s\n" % attack.run)
        for folder in (".githooks/", "hooks/", "templates/hooks/")
        for name in ("post-checkout", "post-index-change", "reference-transaction")
    }
    attack.first = attack.upstream.create("evil", hooks).head()
    commit = attack.submodule("../evil.git", **hooks)
    args = [commit] * (ref == "commit")
    attack.harmless(commit, *args)
    template = "--template=%s" % (attack.activate.live() / "templates")
    run_git("clone", "-q", template, attack.url, attack.plain)
    attack.works()
    (own_home / ".gitconfig").write_text("[core]\n\thooksPath = .githooks\n")
    run_git("clone", "-q", attack.url, str(attack.plain) + "2")
    attack.works()
    attack.harmless(commit, *args)
    assert (attack.activate.live() / "sub/.githooks/post-checkout").exists()


def test_filters_that_the_tree_asks_for_do_not_run(attack):
    section = '[filter "evil"]\n\tsmudge = {0}\n\tprocess = {0}\n\trequired\n'.format(attack.run)
    files = dict.fromkeys((".gitconfig", ".lfsconfig", "config"), section)
    files[".gitattributes"] = "* filter=evil diff=evil merge=evil\n"
    commit = attack.repo.commit(files)
    attack.harmless(commit)
    attack.activate("r", env=allow("filter.evil.smudge", attack.run + "; cat"))
    attack.works()
    attack.harmless(commit)


@pytest.mark.parametrize(
    "url, setting, reason",
    daily(2, [
        ("ext::sh -c touch%% %(pwned)s", "protocol.ext.allow", "transport 'ext' not allowed"),
        ("file://%(path)s", "protocol.file.allow", "transport 'file' not allowed"),
        ("--upload-pack=%(run)s", None, "No url found for submodule path 'sub' in .gitmodules"),
        ("-u%(run)s;:x", None, "No url found for submodule path 'sub' in .gitmodules"),
        ("ssh://-oProxy=%(run)s/x", None, "strange hostname '-oProxy=touch ' blocked"),
    ]),
)
def test_a_submodule_from_where_it_must_not_come(attack, url, setting, reason):
    attack.submodule('"%s"' % (url % dict(vars(attack), path=attack.repo.path)))
    assert attack.refused() == reason
    if setting:
        attack.activate("r", env=allow(setting))
        assert attack.pwned.exists() or (attack.activate.live() / "sub/f").exists()


def test_a_submodule_that_names_a_command_or_a_folder_outside(attack):
    attack.submodule("../r.git", "\tupdate = !%s\n" % attack.run)
    assert attack.refused() == "invalid value for 'submodule.sub.update'"
    attack.submodule("../r.git", name="../../../../../../outside/x")
    assert attack.refused() == "No url found for submodule path 'sub' in .gitmodules"
    attack.submodule("../r.git")
    attack.activate("r", env=allow("submodule.sub.update", "!" + attack.run))
    attack.works()


@pytest.mark.slow
@pytest.mark.parametrize("threshold", ["512m", "16m"])
def test_a_huge_file(attack, small_disk, tmp_path, own_home, threshold):
    """Of few bytes over the wire: it goes live, or there is no room for it.

    git holds a file in memory up to a threshold, and treats what is larger in another way.
    """
    (own_home / ".gitconfig").write_text("[core]\n\tbigFileThreshold = %s\n" % threshold)
    huge = tmp_path / "huge"
    with huge.open("wb") as handle:
        for _ in range(HUGE_BYTES >> 20):
            handle.write(b"x" * (1 << 20))
    entry = ("100644", "huge", attack.repo.git("hash-object", "-w", str(huge)))
    huge.unlink()
    attack.move(small_disk(HUGE_BYTES // 2))
    commit_tree(attack.repo, entry)
    assert "make room for" in attack.refused()
    attack.move_back()
    attack.harmless(attack.repo.head())
    assert (attack.activate.live() / "huge").stat().st_size == HUGE_BYTES


@pytest.mark.slow
def test_many_files_of_few_objects(attack, small_disk):
    """Four objects are enough for a million: it goes live, or there is no room for it."""
    repo, width = attack.repo, round(FILES ** (1 / 3))
    attack.move(small_disk(32 << 20))
    mode, child = "100644", blob(repo, "x")
    for _ in range(3):
        names = sorted("%d" % number for number in range(width))
        child, mode = tree(repo, *((mode, name, child) for name in names)), "40000"
    repo.git("update-ref", "HEAD", repo.git("commit-tree", "-m", "evil", "-p", "HEAD", child))
    assert "make room for" in attack.refused()
    attack.move_back()
    attack.harmless(repo.head())
    found = sum(len(files) for _, _, files in os.walk(str(attack.activate.live() / "0")))
    assert found == width**2
