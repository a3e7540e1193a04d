#!/usr/bin/env bash
# A Slurm cluster on one machine for the tests: one controller, a few slurmd, fake GPUs, munge, and accounting if wanted.
# Everything lies in one folder, listens on the loopback address and ends with `stop`. Needs root (munge and slurmd do) and
# Debian's packages, which `install` brings (as root, or by sudo) if they are not there.
#
#   virtual_slurm.sh install | start | stop | env | nodes
#   virtual_slurm.sh cut NODE       power cut: its slurmd, steps and tasks vanish; the controller is not told
#   virtual_slurm.sh fail NODE      a power cut that the controller is told of
#   virtual_slurm.sh orphan NODE    only slurmd vanishes, its tasks live on
#   virtual_slurm.sh boot NODE      slurmd again
#   virtual_slurm.sh halt | resume  the controller vanishes; comes back with the state it had saved
#
# SLURM_CI_DIR, SLURM_CI_PORT   folder (wiped by start) and first port; two clusters need two of each
# SLURM_CI_NODES, SLURM_CI_CPUS   nodes n1, n2, …; processors of each, which may be more than there are
# SLURM_CI_ACCT=dbd|none        with or without sacct
# SLURM_CI_CONF                 more lines for slurm.conf
set -u
dir=$(realpath -m "${SLURM_CI_DIR:-/dev/shm/mixerbench-slurm}")
port=${SLURM_CI_PORT:-26817} count=${SLURM_CI_NODES:-4} cpus=${SLURM_CI_CPUS:-2} acct=${SLURM_CI_ACCT:-dbd}
host=$(hostname -s)
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$dir/slurm.conf MYSQL_UNIX_PORT=$dir/mysql.sock
export MIXERBENCH_VIRTUAL_SLURM=$dir # in the environment of every daemon that is ours: that is how `ours` finds it

fail() { echo "virtual_slurm: $*" >&2; exit 1; }

until_true() { # seconds, command …
  local rounds=$(($1 * 20)); shift
  while ! "$@" >/dev/null 2>&1; do ((rounds-- > 0)) || return 1; sleep 0.05; done; }

ours() { # process ids of our daemons of a name, and with a second word only those that have it among their arguments
  local file pid
  for file in $(grep -lszx "MIXERBENCH_VIRTUAL_SLURM=$dir" /proc/[0-9]*/environ 2>/dev/null); do
    pid=${file#/proc/} pid=${pid%/environ}
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] || continue
    [ -z "${2:-}" ] || tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qx -- "$2" || continue
    echo "$pid"
  done; }

steps() { # slurmstepds of a node (or *) and all below them; a slurmstepd is known by the log that it holds open
  local pid found=() i
  for pid in $(pgrep -f '^slurmstepd: '); do
    # shellcheck disable=SC2254
    for file in "/proc/$pid"/fd/*; do case $(readlink "$file") in "$dir"/log/slurmd.$1.log) found+=("$pid"); break ;; esac; done
  done
  for ((i = 0; i < ${#found[@]}; i++)); do mapfile -t -O ${#found[@]} found < <(pgrep -P "${found[i]}"); done
  echo "${found[@]:-}"; }

slay() { # process ids …: gone when this returns
  [ $# = 0 ] && return
  kill -9 "$@" 2>/dev/null
  local pid
  for pid; do until_true 10 eval "! kill -0 $pid || grep -q '^State:.Z' /proc/$pid/status"; done; }

packages=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server) # the last two for accounting

install() { # twice, since mirrors fail now and then
  local name missing= root=()
  for name in munged slurmctld slurmd sbatch slurmdbd mariadbd; do command -v $name >/dev/null || missing=$name; done
  [ -n "$missing" ] || return 0
  [ "$(id -u)" = 0 ] || root=(sudo -n)
  for _ in 1 2; do
    "${root[@]}" apt-get update -q && "${root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -q --no-install-recommends "${packages[@]}" && return 0
    sleep 5
  done
  fail "apt-get could not install ${packages[*]}"; }

configure() {
  local account="AccountingStorageType=accounting_storage/none" loopback=127.0.0.1 listen=
  if [[ $(getent ahostsv4 "$host") == 127.* ]]; then listen=CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
  else loopback=$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}'); fi
  [ "$acct" = none ] || account="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$loopback
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$dir/munge.sock"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=virtual
SlurmctldHost=$host($loopback)
SlurmctldPort=$port
$listen
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire also delays every requeue; 5 is the least that is taken.
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=15
SlurmctldTimeout=5
MinJobAge=3600
FirstJobId=$(($(date +%s) % 60000000 + 1))
GresTypes=gpu
# A task that uses more memory than it asked for is killed; looked at each second.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
$account
NodeName=n[1-$count] NodeHostname=$host NodeAddr=$loopback Port=[$((port + 11))-$((port + 10 + count))] CPUs=$cpus RealMemory=4000 Gres=gpu:1
PartitionName=main Nodes=n[1-$count] Default=YES State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=n[1-$count] State=UP MaxTime=60 PriorityTier=10 PreemptMode=OFF
${SLURM_CI_CONF:-}
CONF
  mknod "$dir/gpu" c 1 3 # any character device will do
  echo "NodeName=n[1-$count] Name=gpu File=$dir/gpu" >"$dir/gres.conf"
  (umask 077; cat >"$dir/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=$loopback
DbdPort=$((port + 1))
$listen
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock
PidFile=$dir/slurmdbd.pid
LogFile=$dir/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounts
CommitDelay=0
CONF
  ); }

quiet() { "$@" </dev/null >>"$dir/log/start.log" 2>&1; }

database() { # without a password: root by its socket, which only root can reach
  local options=(--no-defaults --user=root --datadir="$dir/mysql" --innodb-buffer-pool-size=32M --innodb-log-file-size=16M)
  quiet mariadb-install-db "${options[@]}" --skip-test-db --auth-root-authentication-method=normal || fail "no database; see $dir/log"
  # Not by `quiet`: its shell would stay, and hold the caller's pipe.
  setsid mariadbd "${options[@]}" --socket="$dir/mysql.sock" --pid-file="$dir/mysql.pid" --skip-networking \
    --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 --skip-log-bin --performance-schema=OFF \
    </dev/null >>"$dir/log/start.log" 2>&1 & disown
  until_true 60 mariadb-admin --no-defaults --socket="$dir/mysql.sock" ping || fail "no database; see $dir/log"
  quiet slurmdbd
  until_true 60 grep -qs 'slurmdbd version' "$dir/log/slurmdbd.log" || fail "slurmdbd did not start; see $dir/log"; }

controller() { quiet slurmctld -f "$SLURM_CONF"; until_true 30 eval 'scontrol ping | grep -q UP' || fail "no controller; see $dir/log"; }

node() { quiet slurmd -f "$SLURM_CONF" -N "$1" || fail "slurmd $1 did not start; see $dir/log"; }

all_idle() { [ "$(sinfo -hN -p main -o %T | grep -cx idle)" = "$count" ]; }

start() {
  [ "$(id -u)" = 0 ] || fail "must be started by root"
  for name in munged slurmctld slurmd sbatch; do command -v $name >/dev/null || fail "$name is not installed"; done
  [ -z "$(ours munged)" ] || fail "a cluster is up in $dir: stop it first"
  [ ! -e "$dir" ] || [ -e "$dir/slurm.conf" ] || rmdir "$dir" || fail "$dir is there and is not a cluster's folder"
  rm -rf "$dir"
  mkdir -p "$dir"/{log,state,spool,mysql} || exit 1
  (umask 077; head -c 128 /dev/urandom >"$dir/munge.key")
  configure
  quiet munged --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" --num-threads=4 \
    --origin=127.0.0.1 --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" || fail "munged did not start; see $dir/log"
  [ "$acct" = none ] || database
  controller
  for ((n = 1; n <= count; n++)); do node "n$n"; done
  until_true 60 all_idle || fail "nodes are not idle: $(sinfo -hN -o '%N=%T' | xargs)"; }

stop() { # nothing is kept, so nothing is waited for: first what could start tasks, then the tasks
  # shellcheck disable=SC2046
  slay $(ours slurmctld) $(ours slurmd)
  # shellcheck disable=SC2046
  slay $(steps '*')
  # shellcheck disable=SC2046
  slay $(ours slurmdbd) $(ours mariadbd) $(ours munged)
  if [ -e "$dir/slurm.conf" ]; then rm -rf "$dir"; fi; }

# shellcheck disable=SC2046
case ${1:-} in
  install) install ;;
  start) start || { stop; exit 1; } ;;
  stop) stop ;;
  env) echo "export SLURM_CONF=$dir/slurm.conf" ;;
  nodes) sinfo -hN -p main -o '%N %T %E' ;;
  cut) slay $(ours slurmd "${2:?node}"); slay $(steps "$2") ;;
  fail) slay $(ours slurmd "${2:?node}"); slay $(steps "$2"); scontrol update NodeName="$2" State=DOWN Reason=test ;;
  orphan) slay $(ours slurmd "${2:?node}") ;;
  boot) node "${2:?node}" ;;
  halt) slay $(ours slurmctld) ;;
  resume) controller ;;
  *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
