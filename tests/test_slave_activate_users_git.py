"""The user's own git and ssh, forges without .git, settings for one repository, group and ACL."""

import os
import stat
import struct
import subprocess

import pytest
from activate_support import as_another_user, git
from product import SHELLS

REFUSING = '#!/bin/sh\necho "args: $*" >&2\necho "Permission denied (publickey)." >&2\nexit 255\n'
pytestmark = pytest.mark.usefixtures("repo")


def serving(path, upstream, log):
    """An ssh that serves the upstream's repositories, and writes down how it was called."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        '#!/bin/sh\necho "$0 $*" >>%s\n'
        "case $* in *-G*) exit 0 ;; esac\n"
        'for command in "$@"; do :; done\ncd "%s" && eval "$command"\n' % (log, upstream.base_path)
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("condition", ["gitdir:~/repos/", "gitdir:~/repos/.server-update/"])
@pytest.mark.parametrize("shell", SHELLS)
def test_a_deploy_key_by_includeif(activate, upstream, repo, own_home, tmp_path, condition, shell):
    log = tmp_path / "log"
    ssh = serving(tmp_path / "my bin" / "ssh", upstream, log)
    (own_home / ".gitconfig").write_text(
        '[includeIf "%s"]\n\tpath = .gitconfig-site\n' % condition
    )
    (own_home / ".gitconfig-site").write_text("[core]\n\tsshCommand = '%s' -i key\n" % ssh)
    env = {"SERVER_UPDATE_BASE_URL": "ssh://git@forge"}
    repo.path.rename(upstream.folder / "plain")
    (upstream.folder / "r.git").symlink_to("plain")
    for _ in range(2):
        result = activate("r", prefix=shell.split(), env=dict(env, PATH=str(os.environ["PATH"])))
        assert "'/r.git'" in log.read_text(), result
        assert "-i key -o BatchMode=yes -o ConnectTimeout=20" in log.read_text()


def test_a_url_by_includeif_and_by_the_remotes_name(activate, upstream, repo, own_home):
    """insteadOf is git's own business; hasconfig needs the remote (git 2.36)."""
    (own_home / ".gitconfig").write_text(
        '[includeIf "gitdir:%s/"]\n\tpath = .gitconfig-site\n' % activate.repos
    )
    (own_home / ".gitconfig-site").write_text(
        '[url "%s/"]\n\tinsteadOf = forge:\n' % upstream.base_path
    )
    activate.settings["BASE_URL"] = "forge:/"
    assert activate.good("r")[0] == repo.head()


def test_another_name_for_the_remote(activate, repo, own_home):
    """clone.defaultRemoteName: what upstream has is found all the same."""
    (own_home / ".gitconfig").write_text("[clone]\n\tdefaultRemoteName = upstream\n")
    activate.good("r")
    first, second = repo.head(), repo.commit({"f": "2"})
    assert activate.good("--commit", second, "r") == (second, first)
    third = repo.commit({"f": "3"})
    assert activate.good("r", third) == (third, second)
    activate.settings["GIT_FROM"] = "127.0.0.1"
    assert activate("r").status == 0
    mirror = git(activate.state / "r.git", "for-each-ref", "--format=%(objectname) %(refname)")
    assert mirror == third + " refs/heads/main"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["my ssh", "it's ssh", 'a "b" $c'])
def test_git_ssh_with_a_space_in_its_path(activate, tmp_path, shell, name):
    ssh = tmp_path / name / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(REFUSING)
    ssh.chmod(0o755)
    env = {"SERVER_UPDATE_BASE_URL": "ssh://somewhere/x", "GIT_SSH": str(ssh)}
    result = activate("r", prefix=shell.split(), env=env)
    assert result.status == 1
    assert "args: -o BatchMode=yes" in result.err, result


def test_core_sshcommand_goes_before_git_ssh(activate, tmp_path, own_home):
    for name in ("one", "two", "three"):
        (tmp_path / name).write_text(REFUSING.replace("args", name))
        (tmp_path / name).chmod(0o755)
    env = {"SERVER_UPDATE_BASE_URL": "ssh://somewhere/x", "GIT_SSH": str(tmp_path / "one")}
    (own_home / ".gitconfig").write_text("[core]\n\tsshCommand = %s\n" % (tmp_path / "two"))
    assert "two: -o BatchMode" in activate("r", env=env).err
    env["GIT_SSH_COMMAND"] = str(tmp_path / "three")
    assert "three: -o BatchMode" in activate("r", env=env).err


@pytest.mark.parametrize("shell", SHELLS)
def test_a_base_url_that_is_the_whole_url(activate, upstream, shell):
    folder = upstream.folder / "site" / "_git"
    folder.mkdir(parents=True)
    repo = upstream.create("x")
    repo.path.rename(folder / "x")
    repo.path = folder / "x"
    prefix = shell.split()
    activate.settings["BASE_URL"] = "file://%s/site/_git/{repo}" % upstream.base_path
    assert activate.good("x", prefix=prefix)[0] == repo.head()
    (upstream.folder / "x-x").symlink_to(folder)
    activate.settings["BASE_URL"] = upstream.base_path + "/{repo}-{repo}/{repo}"
    assert activate.good("x", prefix=prefix)[0] == repo.head()
    assert git(activate.live("x"), "remote", "get-url", "origin") == (
        upstream.base_path + "/x-x/x"
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_a_setting_for_one_repository(activate, upstream, repo, tmp_path, shell):
    other = upstream.create("sub/a.b", {"other": "1"})
    hooks = tmp_path / "other hooks"
    hooks.mkdir()
    (hooks / "post-update").write_text("#!/bin/sh\ntouch ran\n")
    (hooks / "post-update").chmod(0o755)
    conf = tmp_path / "slave.conf"
    conf.write_text(
        "BASE_URL.a.b=%s/sub\nBASE_URL=%s\nHOOKS_DIR.a.b = '%s'\nSUBMODULES.a.b=no\n"
        "BASE_URL.a=/nowhere\nBASE_URL.zzz=/nowhere\nREPOS_DIR=%s\nTIMEOUT.r=50\n"
        % (upstream.base_path, upstream.base_path, hooks, activate.repos)
    )
    activate.settings = {"CONF": str(conf)}
    prefix = shell.split()
    assert activate.good("a.b", prefix=prefix)[0] == other.head()
    assert (activate.live("a.b") / "ran").exists()
    assert activate.good("r", prefix=prefix)[0] == repo.head()
    assert not (activate.live() / "ran").exists()
    env = {"SERVER_UPDATE_BASE_URL": upstream.base_path + "/none"}
    assert activate("a.b", prefix=prefix, env=env).status == 1, "the environment wins"


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("BASE_URL.=/x", "unknown setting 'BASE_URL.'"),
        ("REPOS_DIR.r=/x", "unknown setting 'REPOS_DIR.r'"),
        ("PORT.r=80", "unknown setting 'PORT.r'"),
        ("BASE_URL.other=-x", "bad BASE_URL.other '-x'"),
        ("SUBMODULES.r=x", "bad SUBMODULES.r 'x'"),
        ("BASE_URL.$(touch x)=/x", None),
        ("BASE_URL.a;touch x=/x", None),
    ],
)
def test_a_bad_setting_for_one_repository(activate, tmp_path, line, complaint):
    conf = tmp_path / "slave.conf"
    conf.write_text(line + "\n")
    activate.settings["CONF"] = str(conf)
    result = activate("r", cwd=str(tmp_path))
    assert not (tmp_path / "x").exists()
    if complaint:
        assert (result.status, result.err) == (
            2,
            "slave-activate: %s:1: %s\n" % (conf, complaint),
        )


def groups_and_modes(folder):
    return {
        (
            path.relative_to(folder).as_posix(),
            path.stat().st_gid,
            stat.S_IMODE(path.stat().st_mode),
        )
        for path in [
            folder,
            folder / ".git",
            folder / ".git/objects",
            folder / "d",
            folder / "d/f",
        ]
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_setgid_folder_gives_its_group_as_to_a_clone(activate, upstream, when, tmp_path):
    """Also where the state folder was there before, with another group."""
    if os.getuid():
        pytest.skip("another group needs root")
    upstream.create("g", {"d/f": "1"})
    activate.repos.mkdir(parents=True)
    if when == "after":
        activate.good("g")
    os.chown(str(activate.repos), 0, 54321)
    activate.repos.chmod(0o2775)
    activate.good("g")
    clone = activate.repos / "clone"
    subprocess.check_call(["git", "clone", "-q", upstream.base_path + "/g.git", str(clone)])
    assert groups_and_modes(activate.live("g")) == groups_and_modes(clone)
    assert activate.live("g").stat().st_gid == 54321
    assert (activate.live("g") / "d/f").stat().st_gid == 54321


def acl(*entries):
    """An access control list as the kernel takes it, see acl(5): (tag, rights, user) each."""
    packed = [struct.pack("<HHi", *entry) for entry in entries]
    return struct.pack("<I", 2) + b"".join(packed)


DEFAULT_ACL = acl((1, 7, -1), (2, 7, 54321), (4, 5, -1), (16, 7, -1), (32, 5, -1))


def read_acl(path):
    return os.getxattr(str(path), "system.posix_acl_access")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_default_acl_is_inherited_as_by_a_clone(activate, upstream, when):
    upstream.create("g", {"d/f": "1"})
    activate.repos.mkdir(parents=True)
    if when == "after":
        activate.good("g")
    try:
        os.setxattr(str(activate.repos), "system.posix_acl_default", DEFAULT_ACL)
    except OSError:
        pytest.skip("this filesystem has no ACL")
    activate.good("g")
    clone = activate.repos / "clone"
    subprocess.check_call(["git", "clone", "-q", upstream.base_path + "/g.git", str(clone)])
    for name in (".", "d", "d/f", ".git"):
        assert read_acl(activate.live("g") / name) == read_acl(clone / name)
        assert struct.pack("<i", 54321) in read_acl(activate.live("g") / name)


def test_nothing_stays_in_the_repositories_folder(activate, repo):
    activate.good("r")
    assert sorted(os.listdir(str(activate.repos))) == [".server-update", "r"]
    (activate.repos / ".r.new").mkdir()
    activate.good("r")
    assert sorted(os.listdir(str(activate.repos))) == [".server-update", "r"]


def test_as_an_ordinary_user_too(activate, repo):
    prefix = as_another_user(activate)
    result = activate("r", prefix=prefix)
    assert (result.status, result.err) == (0, ""), result
