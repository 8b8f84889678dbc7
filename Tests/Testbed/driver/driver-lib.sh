# What dom0 can tell the driver domain to do; sourced by its init.

vxd_pid() { cat /run/vxd.pid 2>/dev/null; }
vxd_answers() { vxctl status --json >/dev/null 2>&1; }

wait_until() { # TENTHS COMMAND...
  left=$1
  shift
  until "$@"; do
    left=$((left - 1))
    [ $left -gt 0 ] || { echo "not within the limit: $*"; return 1; }
    usleep 100000
  done
}

start_vxd() {
  vxd "$@" 2>>/dev/console &
  echo $! >/run/vxd.pid
  wait_until 200 vxd_answers
}

kill_vxd() {
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  true
}

# What must be what it was before there were guests.
resources() {
  echo "threads $(ls "/proc/$(vxd_pid)/task" | wc -l) descriptors $(ls "/proc/$(vxd_pid)/fd" | wc -l)" \
    "mappings $(grep -c -E 'privcmd|gntdev' "/proc/$(vxd_pid)/maps")"
}

# One field of a device: field NAME GUEST/DEVICE
field() { vxctl show "$2" --json | tr ',{}' '\n\n\n' | sed -n "s/.*\"$1\": *\"\{0,1\}\([^\"]*\)\"\{0,1\} *$/\1/p" | head -n 1; }

# What requests of a device cost so far: requests notifications interrupts mapping-calls
costs() {
  set -- "$(vxctl show "$1" --json | tr ',{}' '\n\n\n' | tr -d ' "')"
  value() { printf '%s\n' "$1" | sed -n "s/^$2://p" | head -n 1; }
  echo "$(($(value "$1" reads) + $(value "$1" writes) + $(value "$1" flushes))) $(value "$1" notifications) $(value "$1" interrupts)" \
    "$(value "$1" mapCalls)"
}

# dom0 has no way into a driver domain but Xenstore: it writes "NUMBER COMMAND" to data/command and finds "NUMBER RC" in data/result, the output
# in data/output.
follow_commands() { # WORDS
  xenstore-write data/command ""
  mkfifo /run/commands
  xenstore-watch data/command >/run/commands &
  echo "DRIVER UP domain $(xenstore-read domid) $1"
  done=
  while read -r _; do
    line=$(xenstore-read data/command)
    [ -n "$line" ] && [ "$line" != "$done" ] || continue
    done=$line
    eval "${line#* }" >/tmp/output 2>&1 </dev/null
    rc=$?
    # xenstore-write takes one line.
    xenstore-write data/output "$(head -c 1900 /tmp/output | tr '\n' '~')"
    xenstore-write data/result "${line%% *} $rc"
  done </run/commands
}
