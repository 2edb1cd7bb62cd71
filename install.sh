#!/bin/sh
# install.sh master [SLAVE...]   this machine has others update: server-update and its slave list,
#                                to which these slaves are added
# install.sh slave               this machine is updated: slave.py, enabled and started
# install.sh relay [SLAVE...]    both: updated itself, it has these slaves beneath it updated, too
# install.sh uninstall           remove what these put here; settings and clones stay
#
#   --prefix DIR     install into DIR/bin and DIR/share (/usr/local)
#   --user NAME      who runs the slave, or owns the master's secret (who called sudo, else root)
#   --repos DIR      where the clones go live (~/repos); like the next two for a new slave.conf
#   --base-url URL   clone URL/NAME.git
#   --port N         listen on this port (9999)
#   --serve FILE     the slave also serves this file at /; '' ends that
#   --no-start       neither enable, start nor restart the slave
#   --repo NAME      relay: print the key for a forge that tells of pushes to this repository
#   --new-secret     master: make a master key, and say how each slave gets its own key from it
#   --dry-run        say what would be done, and do nothing
#   --version        print the version
#   -h, --help       print this
#
# To upgrade run it again: it replaces what differs, and restarts the slave only then, or where
# slave.conf has been changed since it started. With DESTDIR=FOLDER in the environment all goes
# below FOLDER, and no service is touched.
# Exit status: 0 done, or nothing to do; 1 failed; 2 usage or a bad setting, nothing was touched.
set -euf
unset CDPATH
umask 022
VERSION=2.0
export COLUMNS=80 NO_COLOR=1 # for --help, which becomes the man pages
DESTDIR=${DESTDIR-}
SERVICE=server-update-slave
# There from before the slave's files change until it has been restarted.
PENDING=/run/$SERVICE.restart
LOCK=/run/$SERVICE.install
# Of a file that is being written: a name that nobody else gives.
BESIDE=.server-update-new
SYSTEM_PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# What the command line says.
role=''
slaves=''
given=''
prefix=''
user=''
repos=''
base_url=''
port=''
serve=''
no_start=''
repo=''
new_secret=''
dry_run=''

# What find_places and find_user find out:
#   here         the folder of this script and of those that it installs
#   bin, share   where programs and man pages go, below DESTDIR
#   config       the folder of the settings, as the scripts name it
#   etc          the same below DESTDIR; conf, list, secret and master_key are files in it
#   link         /bin/slave-activate
#   path         the PATH of the service
#   is_private   set where somebody who is not root installs for himself
#   manager      systemd, openrc or none; services is set where it may be told to do things
#   unit         what starts slave.py: a unit, a service script or, with neither, a plain script
#   log          where slave.py's log is, in words
#   home         of user, the one who runs the slave
#   reader       the group that a file is to have that is written, if any
#   slavelist    what SLAVELIST is to be in a new slave.conf; empty but for a relay
#   served       what follows slave.py in a command: the file to serve, in quotes

slavelist=''

# What a run has done: something at all, something that slave.py has to be restarted for.
changed=''
restart=''

say() {
  printf '%s\n' "$*"
}

die() { # STATUS MESSAGE
  status=$1
  shift
  say "install.sh: $*" >&2
  exit "$status"
}

# --- the command line ---

print_help() {
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
}

check_value() { # OPTION [VALUE] ...
  if [ $# -eq 1 ]; then
    die 2 "$1 needs a value"
  fi
  # An empty one is a value for --serve alone: no file.
  if [ -z "$2" ] && [ "$1" != --serve ]; then
    die 2 "$1 needs a value"
  fi
}

parse_args() {
  while [ $# -gt 0 ]; do
    # --port=80 is --port 80
    case $1 in
      --no-start=* | --new-secret=* | --dry-run=*)
        die 2 "${1%%=*} takes no value"
        ;;
      --*=*)
        option=${1%%=*}
        value=${1#*=}
        shift
        set -- "$option" "$value" "$@"
        ;;
    esac
    case $1 in
      -h | --help)
        print_help
        exit 0
        ;;
      --version)
        say "install.sh $VERSION"
        exit 0
        ;;
      --prefix | --user | --repos | --base-url | --port | --serve | --repo)
        check_value "$@"
        take_option "$1" "$2"
        shift
        ;;
      --no-start | --new-secret | --dry-run)
        take_option "$1" yes
        ;;
      -*)
        die 2 "unknown option '$1': see ./install.sh --help"
        ;;
      *)
        take_word "$1"
        ;;
    esac
    shift
  done
}

take_option() { # OPTION VALUE
  given="$given $1"
  case $1 in
    --prefix) prefix=$2 ;;
    --user) user=$2 ;;
    --repos) repos=$2 ;;
    --base-url) base_url=$2 ;;
    --port) port=$2 ;;
    --serve) serve=$2 ;;
    --repo) repo=$2 ;;
    --no-start) no_start=$2 ;;
    --new-secret) new_secret=$2 ;;
    --dry-run) dry_run=$2 ;;
  esac
}

take_word() { # WORD: the first is the role, all others are slaves
  if [ -z "$role" ]; then
    role=$1
  else
    slaves="$slaves $1"
  fi
}

is_given() { # OPTION
  case "$given " in
    *" $1 "*) return 0 ;;
  esac
  return 1
}

check_usage() {
  case $role in
    master)
      allow_options --prefix --user --new-secret --dry-run
      ;;
    slave)
      allow_options --prefix --user --repos --base-url --port --serve \
        --no-start --dry-run
      ;;
    relay)
      allow_options --prefix --user --repos --base-url --port --serve \
        --no-start --repo --dry-run
      ;;
    uninstall)
      allow_options --prefix --dry-run
      ;;
    *)
      die 2 "unknown role '$role': it is master, slave, relay or uninstall;" \
        "see ./install.sh --help"
      ;;
  esac
  if [ -n "$slaves" ]; then
    case $role in
      slave | uninstall) die 2 "$role takes no '${slaves# }'" ;;
    esac
  fi
  check_path "$prefix"
  check_path "$serve"
  check_repo "$repo"
}

allow_options() { # OPTION...: those that the role takes
  for option in $given; do
    case " $* " in
      *" $option "*) ;;
      *) die 2 "not for $role: $option" ;;
    esac
  done
}

check_path() { # PATH: it goes between quotes into units and into commands for people
  case $1 in
    *[\"\'\`\\\$%]* | *[[:cntrl:]]* | [!/]*)
      die 2 "--prefix and --serve take absolute paths without quotes, \\, \$ and %"
      ;;
  esac
}

check_repo() { # NAME or nothing: by the rule that slave.py has
  case $1 in
    [!A-Za-z0-9_]* | *[!A-Za-z0-9._-]* | *..* | *.git | *.lock)
      die 2 "bad repository '$1'"
      ;;
  esac
  if [ "${#1}" -gt 100 ]; then
    die 2 "too long: '$1'"
  fi
}

# --- what is there ---

find_places() {
  here=$(cd "$(dirname "$0")" && pwd)
  is_private=''
  if [ "$(id -u)" -ne 0 ] && [ -z "$DESTDIR" ]; then
    is_private=yes
    if [ -z "$prefix" ]; then
      die 1 "not root: use sudo, or --prefix \"\$HOME/.local\""
    fi
  fi
  prefix=${prefix:-/usr/local}
  prefix=${prefix%/}
  bin=$DESTDIR$prefix/bin
  share=$DESTDIR$prefix/share
  link=$DESTDIR/bin/slave-activate
  path=$prefix/bin:$SYSTEM_PATH
  find_settings
  find_manager
}

# Who is not root has settings of his own, which the scripts find from where they are themselves.
find_settings() {
  reader=''
  config=/etc/server-update
  if [ -n "$is_private" ]; then
    config=$prefix$config
  fi
  etc=$DESTDIR$config
  conf=$etc/slave.conf
  list=$etc/slavelist.txt
  secret=$etc/secret
  master_key=$etc/master-key
}

find_manager() {
  log=''
  services=''
  start_script=$share/server-update/start-slave
  if [ -n "$is_private" ]; then
    manager=none
    unit=$start_script
  elif has_openrc; then
    manager=openrc
    unit=$DESTDIR/etc/init.d/$SERVICE
    log=/var/log/$SERVICE.log
  elif [ -n "$DESTDIR" ] || [ -d /run/systemd/system ]; then
    manager=systemd
    unit=$DESTDIR/etc/systemd/system/$SERVICE.service
    log="journalctl -u $SERVICE"
  else
    manager=none
    unit=$start_script
  fi
  if [ $manager != none ] && [ -z "$DESTDIR" ]; then
    services=yes
  fi
}

has_openrc() { # and it isn't systemd that runs this machine
  [ -e "$DESTDIR/sbin/openrc-run" ] && [ ! -d "$DESTDIR/run/systemd/system" ]
}

check_needs() {
  need_tools cmp # without it all would seem to differ
  case $role in
    master)
      need_tools python3
      need_files server-update slavelist.txt
      ;;
    slave)
      need_tools python3 git
      need_files slave.py slave-activate
      ;;
    relay)
      need_tools python3 git
      need_files server-update slavelist.txt slave.py slave-activate
      ;;
    uninstall)
      need_tools python3
      need_files slave.py
      ;;
  esac
  check_python
}

need_tools() { # TOOL...
  for tool; do
    if ! command -v "$tool" >/dev/null; then
      die 1 "no $tool: install it first"
    fi
  done
}

need_files() { # FILE...
  for file; do
    if [ ! -r "$here/$file" ]; then
      die 1 "no $file beside install.sh"
    fi
  done
}

check_python() { # new enough, and not one of those that come in parts
  if ! why=$(python3 -c '
import sys
version = sys.version_info[:2]
if version < (3, 7):
    sys.exit("python3 is %d.%d here, and must be 3.7 or newer" % version)
import ctypes, http.server, ssl
' 2>&1); then
    die 1 "$(say "$why" | tail -n 1)"
  fi
}

# An upgrade keeps who runs the slave, and what it serves.
find_user() {
  unit_before=$(cat "$unit" 2>/dev/null) || :
  if [ -n "$is_private" ]; then
    caller=$(id -un 2>/dev/null) ||
      die 1 "user $(id -u) has no name here: it needs a line in /etc/passwd"
    if [ "${user:-$caller}" != "$caller" ]; then
      die 2 "--user $user: only root can have slave.py run as somebody else"
    fi
    user=$caller
  fi
  user=${user:-$(user_before)}
  user=${user:-${SUDO_USER:-root}}
  case $user in
    *[!A-Za-z0-9._-]* | -*)
      die 2 "bad user name '$user'"
      ;;
  esac
  if needs_user && ! is_user "$user"; then
    die 2 "there is no user '$user' here"
  fi
  find_home
  find_served
}

# A user who is gone is no reason not to uninstall, or not to have a master here.
needs_user() {
  if [ -n "$DESTDIR" ]; then
    return 1
  fi
  case $role in
    slave | relay) return 0 ;;
  esac
  [ -n "$new_secret" ]
}

is_user() { # NAME
  id "$1" >/dev/null 2>&1
}

# What systemd_unit, openrc_script or print_start_script have written is read again here.
user_before() {
  say "$unit_before" | sed -n \
    -e 's/^User=//p' \
    -e 's/^command_user="\(.*\)"$/\1/p' \
    -e 's/^exec su -s \/bin\/sh \([^ ]*\) -c .*/\1/p'
}

serve_before() {
  say "$unit_before" | sed -n \
    -e "s/^ExecStart=.* '\(.*\)'\$/\1/p" \
    -e "s/^command_args=\" '\(.*\)'\"\$/\1/p" \
    -e "s/^exec .*slave.py' '\(.*\)'\"\{0,1\}\$/\1/p"
}

find_home() {
  home=${HOME-}
  if [ -n "$is_private$DESTDIR" ] && [ -n "$home" ]; then
    return
  fi
  if is_user "$user"; then
    home=$(python3 -c '
import os, sys
print(os.path.expanduser("~" + sys.argv[1]))
' "$user")
  fi
}

find_served() {
  if ! is_given --serve; then
    serve=$(serve_before)
  fi
  served=''
  if [ -n "$serve" ]; then
    served=" '$serve'"
  fi
}

# slave.py alone reads, checks and explains settings. Printed are REPOS_DIR, PORT, 'yes' where it
# speaks TLS, SLAVELIST, SECRET_FILE and BASE_URL, a line each, as slave.conf has them or, where
# there is none, as the options and else the environment say; then a new slave.conf.
# Options that differ from what a slave.conf says are a mistake: it is kept as it is. That of a
# relay has to name a list, whichever that is.
ask_slave() {
  check_no_pipe "$conf"
  print_settings || exit 2
}

print_settings() {
  HOME=$home python3 -I -B -c '
import os, sys

here, conf, config, slavelist, *given = sys.argv[1:]
sys.path.insert(0, here)
import slave

OPTIONS = {"BASE_URL": "--base-url", "REPOS_DIR": "--repos", "PORT": "--port"}
asked = {key: text for key, text in zip(OPTIONS, given) if text}
wanted_list = {"SLAVELIST": slavelist} if slavelist else {}
around = {key: os.environ.get("SERVER_UPDATE_" + key) for key in slave.SETTINGS}
written = dict({key: text for key, text in around.items() if text}, **asked, **wanted_list)

def stop(why):
    sys.exit("install.sh: " + slave.USER_RE.sub("", why))
def read(environ, conf):
    settings = {"SERVER_UPDATE_" + key: text for key, text in environ.items()}
    try:
        return slave.read_settings(dict(settings, SERVER_UPDATE_CONF=conf), {}, config)
    except ValueError as mistake:
        stop(str(mistake).split(" (set by")[0])
    except OSError as error:
        stop("cannot read %s: %s" % (conf, error.strerror or error))

if os.path.lexists(conf):
    now, wanted = read({}, conf), read(asked, os.devnull)
    for key, text in asked.items():
        if now[key] != wanted[key]:
            stop("%s says %s=%s: change that, or leave out %s %s"
                 % (conf, key, now[key], OPTIONS[key], text))
    if slavelist and not now["SLAVELIST"]:
        stop("%s names no list: write SLAVELIST=%s there first" % (conf, slavelist))
else:
    now = read(written, os.devnull)
print(now["REPOS_DIR"], now["PORT"], "yes" if now["TLS_CERT"] else "", sep="\n")
print(now.get("SLAVELIST") or "", now["SECRET_FILE"] or "", now["BASE_URL"], sep="\n")
print("# A line with # shows what holds without it. To change that, remove the # and restart.")
for key, setting in slave.SETTINGS.items():
    mark = "" if key in written else "#"
    default = os.path.join(config, "hooks") if key == "HOOKS_DIR" else setting.default
    value = written.get(key, default)
    print("\n# %s\n%s%s=%s" % (setting.help, mark, key, value))
' "$here" "$conf" "$config" "$slavelist" "$base_url" "$repos" "$port"
}

check_no_pipe() { # FILE: who reads one waits for ever
  if [ -p "$1" ]; then
    die 2 "cannot read $1: it is a pipe, and no file"
  fi
}

# --- changes: each is told, and each is left out of a dry run ---

act() { # PRESENT PAST WHAT COMMAND...: it is said in the one tense or the other
  present=$1
  past=$2
  what=$3
  shift 3
  changed=yes
  if [ -n "$dry_run" ]; then
    say "would $present $what"
    return
  fi
  # 9 is the lock of this run; what a command starts must not hold it.
  if ! why=$("$@" 2>&1 9>&-); then
    die 1 "cannot $present $what: $(last_reason "$why")"
  fi
  say "$past $what"
}

last_reason() { # OUTPUT: 'cat: /x: Permission denied' is 'Permission denied'
  say "$1" | sed -n '$s/.*: //;$p'
}

put() { # MODE FILE TEXT [restart]: have FILE hold TEXT, unless it does already
  if holds "$1" "$2" "$3"; then
    drop_half_written "$2"
    return
  fi
  if [ -d "$2" ]; then
    die 1 "$2 is a folder, and should be a file: move it away first"
  fi
  if [ -n "${4-}" ]; then
    remember_restart
  fi
  if [ -e "$2" ]; then
    act replace replaced "$2" rename_over "$1" "$2" "$3"
  else
    act write wrote "$2" rename_over "$1" "$2" "$3"
  fi
}

holds() { # MODE FILE TEXT
  if [ -z "$(find "$2" -prune -type f -perm "$1" 2>/dev/null)" ]; then
    return 1
  fi
  say "$3" | cmp -s - "$2"
}

# shellcheck disable=SC2317 # act calls it
rename_over() { # MODE FILE TEXT: nobody ever sees half of it
  if write_beside "$1" "$2$BESIDE" "$3" && mv -f "$2$BESIDE" "$2"; then
    return
  fi
  rm -f "$2$BESIDE" 2>/dev/null
  return 1
}

# Nobody but its owner may read it before it has its mode: it may be a secret.
# shellcheck disable=SC2317 # as above
write_beside() ( # MODE FILE TEXT; $reader: the group that it is to have, if any
  mkdir -p "${2%/*}" || exit # before umask: others have to get at what is in it
  umask 077
  # cat, as not every shell says why its own printf could not write
  say "$3" | cat >"$2" || exit
  if [ -n "$reader" ]; then
    chgrp "$reader" "$2" || exit
  fi
  chmod "$1" "$2"
)

drop_half_written() { # FILE: a run that was killed may have left it
  if [ -z "$dry_run" ]; then
    rm -f "$1$BESIDE"
  fi
}

remember_restart() {
  restart=yes
  if [ -n "$services" ] && [ -z "$dry_run" ]; then
    touch "$PENDING"
  fi
}

# --- scripts, their man pages, completion ---

# A text is made before it is put anywhere: in an argument nobody would see that it failed.
install_script() { # NAME INTERPRETER SECTION WHAT [restart]
  text=$(cat "$here/$1") || exit 1
  put 755 "$bin/$1" "$text" "${5-}"
  text=$(man_page "$@") || exit 1
  put 644 "$share/man/man$3/$1.$3" "$text"
}

man_page() { # NAME INTERPRETER SECTION WHAT: the script's --help as a page of the manual
  help=$("$2" "$here/$1" --help) || die 1 "'$1 --help' does not work"
  printf '%s\n' \
    '.\" by server-update' \
    ".TH $1 $3" \
    '.SH NAME' \
    "$1 \\- $4" \
    '.SH DESCRIPTION' \
    .nf
  # A backslash, a hyphen, and a dot or a quote that begins a line mean something to man.
  say "$help" |
    sed 's/\\/\\e/g; s/-/\\-/g; s/^[.'\'']/\\\&&/'
}

install_completion() {
  if [ -d "$share/bash-completion" ] || [ -d "$DESTDIR/usr/share/bash-completion" ]; then
    text=$(completion) || exit 1
    put 644 "$share/bash-completion/completions/server-update" "$text"
  fi
}

# For bash: options, and the names that end a command in the shell's history.
completion() {
  help=$(python3 "$here/server-update" --help) || return
  cat <<END
_server_update() {
  local word=\${COMP_WORDS[COMP_CWORD]} words='$(options '')' values=' $(options ' [A-Z]')'
  [[ \$values != *" \${COMP_WORDS[COMP_CWORD-1]} "* ]] || return 0 # a file, by -o default
  [[ \$word == -* ]] || words=\$(HISTTIMEFORMAT='' history |
    sed -n 's/.*server-update \(.* \)\{0,1\}\([A-Za-z0-9_][A-Za-z0-9._-]*\) *\$/\2/p')
  COMPREPLY=(\$(compgen -W "\$words" -- "\$word"))
}
complete -o default -F _server_update server-update
END
}

options() { # PATTERN: the long options in \$help that PATTERN follows
  say "$help" |
    sed -n "s/^  *\(-., \)*\(--[a-z-]*\)$1.*/\2/p" |
    tr '\n' ' '
}

# --- the service: user_before and serve_before read again what is written here ---

systemd_unit() {
  cat <<END
# Made by install.sh of server-update, which replaces it: use 'systemctl edit $SERVICE'.
[Unit]
Description=server-update slave: takes signals and updates the clones of this machine
After=network-online.target
Wants=network-online.target
[Service]
Type=notify
User=$user
Environment="PATH=$path"
ExecStart="$prefix/bin/slave.py"$served
# SIGHUP has it read its TLS certificate again
ExecReload=/bin/sh -c "kill -HUP \$MAINPID"
Restart=on-failure
RestartSec=5
# 2 is a mistake in the settings; TERM goes to slave.py alone, which stops its updates, within 15 s
# (KILL_AFTER_S and what comes after it there)
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=20
$(systemd_restrictions)
[Install]
WantedBy=multi-user.target
END
}

systemd_restrictions() {
  no_new_privileges=yes
  if [ "$user" = root ]; then
    no_new_privileges=no
  fi
  cat <<END
# Closed: sudo in hooks (root's have no need of it), devices, kernel settings, unusual system calls
NoNewPrivileges=$no_new_privileges
PrivateDevices=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RemoveIPC=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Open: the network for git over https and ssh, netlink to look names up, sockets of local agents
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
# Open: hooks write to /srv, /var and homes, where the clones and ~/.ssh are; not /usr, /boot, /etc
ProtectSystem=full
# Open: root's hooks give files away, become other users and have to be stopped even so; PORT may
# be below 1024
CapabilityBoundingSet=CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_SETGID CAP_SETUID CAP_KILL
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE
# Open: a web server reads the clones
UMask=0022
# Open: hooks run node and java, which compile into memory
MemoryDenyWriteExecute=no
END
}

openrc_script() {
  cat <<END
#!/sbin/openrc-run
# Made by install.sh of server-update, which replaces it.
supervisor=supervise-daemon
command="'$prefix/bin/slave.py'"
command_args="$served"
command_user="$user"
respawn_delay=5
respawn_max=0
retry="TERM/20/KILL/5"
error_log="$log"
export PATH="$path"
depend() { need net; use dns; }
start_pre() { checkpath --file --owner "\$command_user" --mode 0640 "\$error_log"; }
END
}

# What starts slave.py as its user, where no service manager does.
find_start_command() {
  if [ "$user" = "$(id -un)" ]; then
    start_command="'$prefix/bin/slave.py'$served"
  else
    start_command="su -s /bin/sh $user -c \"exec '$prefix/bin/slave.py'$served\""
  fi
}

# It also keeps, for the next run, who runs the slave and what it serves.
print_start_script() {
  say '#!/bin/sh'
  say '# Made by install.sh of server-update, which replaces it.'
  say "exec $start_command"
}

write_unit() {
  find_start_command
  case $manager in
    none) put 755 "$unit" "$(print_start_script)" ;;
    systemd) put 644 "$unit" "$(systemd_unit)" restart ;;
    openrc) put 755 "$unit" "$(openrc_script)" restart ;;
  esac
}

service() { # is-enabled, is-active, is-stopped, enable, disable, start, stop or restart
  case $manager:$1 in
    systemd:is-stopped) # and not about to start, or to start again, as it is not active then
      case $(systemctl is-active $SERVICE) in
        inactive | failed | unknown) return 0 ;;
      esac
      return 1
      ;;
    openrc:is-stopped)
      ! service is-active
      ;;
    systemd:start | systemd:restart)
      # Until slave.py serves (Type=notify); what systemctl says of a failure leads nowhere.
      if ! systemctl -q "$1" $SERVICE >/dev/null 2>&1; then
        say "see $log"
        return 1
      fi
      ;;
    systemd:*)
      systemctl -q "$1" $SERVICE
      ;;
    openrc:is-enabled)
      [ -e /etc/runlevels/default/$SERVICE ]
      ;;
    openrc:is-active)
      rc-service -q $SERVICE status >/dev/null
      ;;
    openrc:enable)
      rc-update -q add $SERVICE default
      ;;
    openrc:disable)
      rc-update -q delete $SERVICE default
      ;;
    openrc:*)
      rc-service -q $SERVICE "$1"
      ;;
  esac
}

# slave.py reads slave.conf when it starts, and not again. When that was is known by its process
# from systemd, by a link from OpenRC. Compared is when the file was changed in any way (ctime), as
# one that is copied or moved here may have an old date. A time to come is the clock's mistake.
runs_with_older_settings() {
  service is-active || return
  started=/run/openrc/started/$SERVICE
  if [ $manager = systemd ]; then
    pid=$(systemctl show -p MainPID $SERVICE) # MainPID=1234; old ones have no --value
    started=/proc/${pid#*=}/stat
  fi
  python3 -c '
import os, sys, time

def read_start(path): # in seconds since 1970; see proc(5) for the 22nd field, in ticks since boot
    if not path.startswith("/proc/"):
        return os.lstat(path).st_ctime
    with open(path) as fields:
        ticks = 1 + int(fields.read().rpartition(")")[2].split()[19])
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + ticks / os.sysconf("SC_CLK_TCK")

conf, started = sys.argv[1:]
try:
    changed = max(os.stat(conf).st_ctime, os.lstat(conf).st_ctime)
    sys.exit(not read_start(started) < changed < time.time())
except OSError: # it has just ended
    sys.exit(1)
' "$conf" "$started"
}

start_service() {
  if ! service is-enabled; then
    act enable enabled "the service $SERVICE" service enable
  fi
  # A run before this one may have ended between a change and the restart.
  if [ -e "$PENDING" ]; then
    restart=yes
  fi
  if runs_with_older_settings; then
    say "$conf has been changed since slave.py started"
    restart=yes
  fi
  if [ -n "$restart" ] && [ $manager = systemd ]; then
    act reload reloaded units systemctl daemon-reload
  fi
  if ! service is-active; then
    act start started "the service $SERVICE" service start
  elif [ -n "$restart" ]; then
    act restart restarted "the service $SERVICE" service restart
  else
    return 0
  fi
  if [ -z "$dry_run" ]; then
    see_it_stay_up
  fi
}

see_it_stay_up() {
  if [ $manager = openrc ]; then
    sleep 2 # one that can't start has failed by then
  fi
  if ! service is-active; then
    die 1 "slave.py does not stay up: see $log"
  fi
  rm -f "$PENDING"
}

stop_service() {
  if ! service is-stopped; then
    act stop stopped $SERVICE service stop
  fi
  if service is-enabled; then
    act disable disabled $SERVICE service disable
  fi
}

# --- a master ---

install_master() {
  check_lists
  put_master
  if [ -n "$new_secret" ]; then
    make_master_key
  fi
  say_how_to_update
}

put_master() {
  install_script server-update python3 1 'have all slaves update a repository'
  install_completion
  if [ -e "$list" ]; then
    add_slaves
  else
    text=$(cat "$here/slavelist.txt" && print_slaves) || exit 1
    put 644 "$list" "$text"
  fi
}

print_slaves() {
  for slave in $slaves; do
    say "$slave"
  done
}

check_lists() { # what is asked for, and what is there
  check_no_pipe "$list"
  if [ -n "$slaves" ]; then
    print_slaves | check_list -
  fi
  if has_slaves; then
    check_list "$list"
  fi
}

has_slaves() { # server-update takes a list without any for a mistake
  grep -qs '^[[:space:]]*[^#[:space:]]' "$list"
}

check_list() { # FILE, or - for standard input
  read_list "$1" >/dev/null || exit 2
}

read_list() { # FILE, or -: its slaves, a line each, as server-update itself reads it
  python3 "$here/server-update" --list "$1" --dry-run all
}

# To the end of the list that is there, as nothing else in it is ours to change.
add_slaves() {
  listed=''
  if has_slaves; then
    listed=$(read_list "$list" 2>/dev/null)
  fi
  for slave in $slaves; do
    if ! say "$listed" | grep -Fqx -e "$slave"; then
      act add added "$slave to $list" append_line "$list" "$slave"
    fi
  done
}

# shellcheck disable=SC2317 # act calls it
append_line() { # FILE LINE: the line before it may lack its end
  if [ -n "$(tail -c 1 "$1")" ]; then
    set -- "$1" "
$2"
  fi
  say "$2" | cat >>"$1"
}

# --- keys: server-update derives a key for each slave from the master key ---

# Where all slaves have one secret until now, the key waits beside its place: as soon as it is
# there, server-update signs with nothing else.
make_master_key() {
  key_file=$master_key
  if [ -e "$secret" ] && [ ! -e "$master_key" ]; then
    key_file=$master_key.next
  fi
  make_key_file "$key_file"
  if [ -z "$dry_run" ]; then
    say_how_slaves_get_keys
  fi
}

make_key_file() { # FILE: a random key in it that its user alone may read, if it isn't there
  if [ -e "$1" ]; then
    say "kept $1"
  else
    text=$(python3 -c 'import os; print(os.urandom(32).hex())') || exit 1
    put 600 "$1" "$text"
  fi
  if [ -z "$DESTDIR" ] && ! belongs_to "$user" "$1"; then
    act give gave "$1 to $user" chown "$user" "$1"
  fi
}

belongs_to() { # USER FILE, or the one that a link leads to
  [ -n "$(find -H "$2" -prune -user "$1" 2>/dev/null)" ]
}

say_how_slaves_get_keys() {
  if [ ! -e "$secret" ]; then
    say "Each slave takes its own key from these, where $user runs slave.py:"
    print_key_lines '' cat
    return
  fi
  say "All slaves share $secret until now. For each a key of its own, without a gap:"
  if [ "$key_file" != "$master_key" ]; then
    say "1. Each slave takes its key beside the shared secret, where $user runs slave.py:"
    print_key_lines " --master-key-file '$key_file'" '{ cat secret; echo; cat; }'
    say "2. This master signs with them:"
    say "  mv '$key_file' '$master_key'"
  fi
  say "3. Once no server-update that began before runs any more, each forgets what is shared:"
  print_key_lines '' cat
  if [ ! -e "$unit" ]; then # else it is the secret of the slave that this machine is, too
    say "  rm '$secret'"
  fi
}

# The key goes through standard input: never into arguments, nor into a shell's history.
print_key_lines() { # OPTIONS COMMAND: what makes the new file of the old one and of the key
  take="umask 077 && cd /etc/server-update && $2 >secret.next && grep -q . secret.next"
  take="$take && chown $user secret.next && mv secret.next secret"
  print_entries | while read -r entry; do
    say "  '$prefix/bin/server-update'$1 --slave-key '$entry' |"
    say "    ssh root@$(print_host "$entry") '$take'"
  done
}

print_entries() { # the slaves that the list has now
  if has_slaves; then
    read_list "$list" 2>/dev/null
  else
    say SLAVE
  fi
}

print_host() { # ENTRY: its host alone
  say "$1" | sed 's,^[A-Za-z]*://,,; s,[/?#].*,,; s,:[0-9]*$,,; s,^\[\(.*\)\]$,\1,'
}

say_how_to_update() {
  say "List the slaves in $list and run ./install.sh slave on each; then here:"
  say "  '$prefix/bin/server-update' NAME"
}

# --- a slave ---

install_slave() {
  answer=$(ask_slave)
  read_answer
  put_slave
  say_what_runs
  if [ -z "$DESTDIR" ]; then
    say "Settings: $conf. Next, on the master: ./install.sh master $(print_entry)"
  fi
}

read_answer() {
  repos=$(say "$answer" | sed -n 1p)
  port=$(say "$answer" | sed -n 2p)
  has_tls=$(say "$answer" | sed -n 3p)
  own_secret=$(say "$answer" | sed -n 5p)
  if [ -n "$own_secret" ]; then
    secret=$DESTDIR$own_secret
  fi
  upstream=$(say "$answer" | sed -n 6p)
  has_password=''
  case $upstream in
    http://*:*@* | https://*:*@*)
      has_password=yes
      upstream=${upstream%%://*}://${upstream##*@}
      ;;
  esac
}

put_slave() {
  install_script slave-activate sh 8 'put a fresh clone live'
  install_script slave.py python3 8 'take signals and update the clones' restart
  link_slave_activate
  write_conf
  make_repos_dir
  if [ -z "$DESTDIR" ] && [ "$user" != root ]; then
    hand_over
  fi
  write_unit
  if [ -n "$services" ] && [ -z "$no_start" ]; then
    start_service
  fi
}

# For what calls it by that path, which is where it was in the oldest slaves.
link_slave_activate() {
  if [ -n "$DESTDIR" ] && [ ! -d "$DESTDIR/bin" ]; then
    act make made "$DESTDIR/bin" mkdir "$DESTDIR/bin"
  fi
  if [ -n "$is_private" ] || is_our_link; then
    return
  fi
  if is_folder_of_scripts "$DESTDIR/bin"; then
    return
  fi
  if is_somebodys_own "$link"; then
    say "kept $link, which is not ours: who calls that does not get $prefix/bin/slave-activate"
    return
  fi
  act link linked "$link" ln -snf "$prefix/bin/slave-activate" "$link"
}

is_somebodys_own() { # FILE: of links, those to a slave-activate are ours, of any prefix
  case $(readlink "$1") in
    */slave-activate) return 1 ;;
  esac
  [ -e "$1" ] || [ -L "$1" ]
}

# /bin may be /usr/bin, and with the prefix /usr what is in it is ours.
is_folder_of_scripts() { # FOLDER
  scripts=$(cd "$bin" 2>/dev/null && pwd -P) || return
  [ "$(cd "$1" 2>/dev/null && pwd -P)" = "$scripts" ]
}

is_our_link() {
  [ "$(readlink "$link")" = "$prefix/bin/slave-activate" ]
}

write_conf() {
  if [ -e "$conf" ]; then
    tell_open_password
    return
  fi
  mode=644
  if [ -n "$has_password" ]; then
    # Nobody else's, but its user has to be able to read it.
    mode=640
    if [ -z "$DESTDIR" ]; then
      reader=$(id -g "$user")
    fi
  fi
  put $mode "$conf" "$(say "$answer" | sed 1,6d)" restart
  reader=''
}

# The rights of a slave.conf that is there already are left to who has written it.
tell_open_password() {
  if [ -n "$(find "$conf" -prune -perm -004)" ] &&
    grep -q '^[^#]*BASE_URL[^=]*=.*https*://[^/]*:[^/]*@' "$conf"; then
    say "Others can read the password in $conf; do:"
    say "  chgrp \"\$(id -g $user)\" '$conf' && chmod 640 '$conf'"
  fi
}

# What another user ran the slave with, whom alone it was for. Root can read it as it is. Where the
# user is a guess (version 1.0 has kept none without a service manager), only root's is given.
hand_over() {
  if ! is_given --user && [ -z "$unit_before" ] && ! belongs_to root "$secret"; then
    return
  fi
  if [ -e "$secret" ] && ! belongs_to "$user" "$secret"; then
    act give gave "$secret to $user" chown "$user" "$secret"
  fi
  if is_for_other_groups "$conf" && ! belongs_to "$user" "$conf"; then
    group=$(id -gn "$user")
    act give gave "$conf to the group $group" chgrp "$group" "$conf"
  fi
}

is_for_other_groups() { # FILE: and not for all
  for group in $(id -G "$user"); do
    set -- "$@" ! -group "$group"
  done
  [ -n "$(find -H "$@" -perm -040 ! -perm -004 2>/dev/null)" ]
}

make_repos_dir() {
  if [ -z "$DESTDIR" ] && [ ! -d "$repos" ]; then
    act make made "$repos" make_folder_of_user "$repos"
  fi
}

# Not by install(1), which not every busybox has. Who owns the folder above it can put a link in
# its place meanwhile: that, and not what it leads to, would be given away (-h).
# shellcheck disable=SC2317 # act calls it
make_folder_of_user() { # FOLDER
  beside=$1$BESIDE
  mkdir -p "${1%/*}" || return
  rmdir "$beside" 2>/dev/null || : # of a run that was killed; what has something in it isn't ours
  mkdir "$beside" || return
  chown -h "$user:$(id -g "$user")" "$beside" || return
  mv "$beside" "$1"
}

tell_missing_page() { # no mistake: the first update may bring it
  if is_given --serve && [ -n "$serve" ] && [ ! -f "$serve" ]; then
    say "There is no file '$serve' here: until there is, / of the slave is a 404."
  fi
}

# Minimal systems lack what git needs for some addresses.
tell_what_git_lacks() {
  case $upstream in
    https://*)
      if ! has_authorities; then
        say "There are no certificates here that git could check $upstream by:" \
          "install ca-certificates."
      fi
      ;;
    ssh://* | [!/]*:[!/]*)
      if ! command -v ssh >/dev/null; then
        say "There is no ssh here, which git needs for $upstream: install openssh-client."
      fi
      ;;
  esac
}

has_authorities() {
  python3 -c '
import os, ssl, sys
paths = ssl.get_default_verify_paths()
folder = paths.capath or os.devnull
sys.exit(not (paths.cafile or os.path.isdir(folder) and os.listdir(folder)))
'
}

say_what_runs() {
  if [ -n "$DESTDIR" ]; then
    return
  fi
  tell_missing_page
  tell_what_git_lacks
  if [ -z "$dry_run" ]; then
    if [ -z "$services" ]; then
      say "To start slave.py as $user, on port $port, with its clones in $repos:"
      say "  $start_command"
    elif [ -n "$no_start" ]; then
      say "The service $SERVICE is left as it was."
      if runs_with_older_settings; then
        say "$conf has been changed since slave.py started: restart it."
      fi
    else
      say "slave.py runs as $user on port $port, with its clones in $repos; its log: $log"
    fi
  fi
}

print_url() { # of this machine's slave.py, as far as can be known here
  scheme=http
  if [ -n "$has_tls" ]; then
    scheme=https
  fi
  say "$scheme://$(uname -n):$port"
}

print_entry() { # what a master's list has to name this slave by, as far as can be known here
  case $has_tls:$port in
    yes:0) say "https://$(uname -n)/" ;;
    yes:*) say "https://$(uname -n):$port/" ;;
    :9999 | :0) uname -n ;;
    *) say "$(uname -n):$port" ;;
  esac
}

# --- a relay: a slave that is the master of those beneath it, and takes word from a forge ---

install_relay() {
  slavelist=$config/slavelist.txt
  answer=$(ask_slave)
  read_answer
  # What a slave.conf says that is there already comes first.
  list=$DESTDIR$(say "$answer" | sed -n 4p)
  check_lists
  # slave.py would not start.
  if [ -z "$slaves" ] && ! has_slaves; then
    die 2 "there is no slave in $list: name those beneath, as in ./install.sh relay web1"
  fi
  put_master
  make_key_file "$secret"
  put_slave
  say_what_runs
  if [ -z "$dry_run$DESTDIR" ]; then
    say_how_forges_tell
  fi
}

say_how_forges_tell() {
  say "Settings: $conf. On each slave in $list: ./install.sh slave"
  tell="At the forge, a webhook for pushes, as JSON, to this URL, with this secret:"
  if [ -z "$repo" ]; then
    say "$tell"
    say "  $(print_url)/hook?repo=NAME"
    say "  what '$prefix/bin/slave.py' --hook-key NAME prints"
    return
  fi
  key=$("$prefix/bin/slave.py" --hook-key "$repo") || exit 1
  say "$tell"
  say "  $(print_url)/hook?repo=$repo"
  say "  $key"
}

# --- gone again ---

uninstall() {
  # The unit may start a slave.py of another prefix.
  if ! grep -qsF -e "'$prefix/bin/slave.py'" -e "\"$prefix/bin/slave.py\"" "$unit"; then
    unit=''
    services=''
  fi
  if [ -n "$services" ]; then
    stop_service
  fi
  if is_our_link; then
    act remove removed "$link" rm -f "$link"
  fi
  remove_ours "$bin/server-update"
  remove_ours "$bin/slave.py"
  remove_ours "$bin/slave-activate"
  if [ -n "$unit" ]; then
    remove_ours "$unit"
  fi
  remove_ours "$start_script"
  remove_ours "$share/man/man1/server-update.1"
  remove_ours "$share/man/man8/slave.py.8"
  remove_ours "$share/man/man8/slave-activate.8"
  remove_ours "$share/bash-completion/completions/server-update"
  if [ -n "$services" ]; then
    forget_unit
  fi
  say_what_is_kept
}

forget_unit() {
  if [ -z "$dry_run" ]; then
    rm -f "$PENDING"
  fi
  if [ $manager = systemd ]; then
    act reload reloaded units systemctl daemon-reload
  fi
}

say_what_is_kept() {
  if [ -z "$DESTDIR" ] && ! is_user "$user"; then
    say "kept: the settings in $etc, the clones of '$user', who is no user here any more"
  elif answer=$(ask_slave 2>/dev/null); then
    say "kept: the settings in $etc, the clones in $(say "$answer" | sed -n 1p)"
  else
    say "kept: the settings in $etc, of which slave.conf has a mistake, and the clones"
  fi
}

remove_ours() { # FILE: what somebody else has put there doesn't speak of us
  if grep -qs server-update "$1"; then
    act remove removed "$1" rm -f "$1"
  fi
  drop_half_written "$1"
}

# --- the plan ---

# A kernel lock, which dies with this run; root's is on a file that nobody else can hold, others
# are on the folder that the target is in.
lock_others_out() {
  target=${DESTDIR:-$prefix}
  if [ "$(id -u)" -eq 0 ] && [ -z "$DESTDIR" ]; then
    exec 9>>"$LOCK"
  elif [ -r "${target%/*}" ]; then
    exec 9<"${target%/*}"
  else
    exec 9</
  fi
  python3 -c '
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for another install.sh", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
'
}

main() {
  parse_args "$@"
  check_usage
  find_places
  check_needs
  lock_others_out # before anything is read that another run may change
  find_user
  case $role in
    master) install_master ;;
    slave) install_slave ;;
    relay) install_relay ;;
    uninstall) uninstall ;;
  esac
  if [ -z "$changed" ]; then
    say "Nothing had to be changed in $DESTDIR$prefix."
  fi
}

main "$@"; exit
