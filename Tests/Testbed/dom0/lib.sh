# What a scenario is written with; sourced by dom0's init before the scenario.
# Each check prints one line, "ok - ..." or "not ok - ...", and the verdict counts them.

PASSED=0
FAILED=0
VXD_LOG=/var/log/vxd.log
VXD_AS=

step() { echo "STEP $* [$(cut -d. -f1 /proc/uptime) s]"; }
passed() { PASSED=$((PASSED + 1)); echo "ok - $* [$(cut -d. -f1 /proc/uptime) s]"; }
failed() { FAILED=$((FAILED + 1)); echo "not ok - $*"; }

check() { # WHAT COMMAND... : one claim, and the command that is true when it holds
  what=$1
  shift
  if "$@" >/tmp/check.out 2>&1; then passed "$what"; else
    failed "$what"
    sed 's/^/    /' /tmp/check.out
  fi
}

equal() { [ "$1" = "$2" ] || { echo "expected '$2', got '$1'"; return 1; }; }
not() { ! "$@"; }

# Polls a condition, with a limit in seconds of the emulated clock. Once a second is enough: each look costs processor time that the guests
# need; POLL says otherwise, in microseconds. A domain that has died ends it: whatever is waited for will not come.
wait_until() { # SECONDS COMMAND...
  deadline=$(($(date +%s) + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$(date +%s)" -lt $deadline ] || { echo "not within the limit: $*"; return 1; }
    [ -z "$(deaths)" ] || { echo "in vain, since a domain has died: $(deaths)"; return 1; }
    usleep "${POLL:-1000000}"
  done
}

# Domains that ended in another way than by powering off, being suspended or being destroyed: xl says how in its logs. Nothing here asks for
# such an end: a crash, a triple fault (a reboot for Xen) and a watchdog's end are unasked at any time. Where guests reboot (MAY_REBOOT) or
# execute another kernel (MAY_RESET), the scenario itself looks for what they say before.
deaths() {
  grep -s -h "has shut down, reason code [${MAY_REBOOT:-1}34${MAY_RESET:-5}]" /var/log/xen/xl-*.log* | tr '\n' ';'
}

show_logs() {
  # All of it whole, by the second serial port, for the folder of the run.
  [ ! -c /dev/ttyS1 ] || stty raw -F /dev/ttyS1
  [ ! -c /dev/ttyS1 ] || (cp -r $VXD_LOG /run/vxd/state /var/log/xen/; cd /var/log/xen && tar cz . >/dev/ttyS1) 2>/dev/null
  for log in $VXD_LOG /var/log/xen/guest-*.log /var/log/xen/qemu-dm-*.log /var/log/xen/xl-*.log /var/log/xen/earlier-*.log /tmp/xl-*.out; do
    [ -s "$log" ] || continue
    echo "LOG $log"
    tail -n 150 "$log"
    echo "LOG end"
  done
  xl list 2>&1 | sed 's/^/LOG xl list: /'
  xl dmesg 2>/dev/null | tail -n 15 | sed 's/^/LOG xen: /'
}

verdict() {
  [ -z "$(deaths)" ] || failed "no domain dies unasked: $(deaths)"
  [ $FAILED -eq 0 ] && [ $PASSED -gt 0 ] || show_logs
  echo "TESTBED VERDICT $PASSED passed, $FAILED failed"
}

# Ends the scenario when the emulated clock says that it has had its time. Until then it shows that this clock runs (see watch_machine).
watch_limit() {
  (
    second=0
    while [ "$second" -lt "$LIMIT" ]; do
      sleep 2
      second=$((second + 2))
      echo "CLOCK $second"
    done
    failed "the scenario ends within its limit, $LIMIT s of the emulated clock"
    ps | sed 's/^/| /'
    show_logs
    echo "TESTBED VERDICT 0 passed, 1 failed"
    sleep 2
    poweroff -f
  ) &
}

# vxd

vxd_pid() { cat /run/vxd.pid 2>/dev/null; }
vxd_runs() { [ -n "$(vxd_pid)" ] && [ -d "/proc/$(vxd_pid)" ] && ! grep -q '^State:.Z' "/proc/$(vxd_pid)/status"; }

start_vxd() { # OPTION... : starts the daemon and waits until its control socket answers
  $VXD_AS vxd "$@" 2>>$VXD_LOG &
  echo $! >/run/vxd.pid
  wait_until 20 vxctl status --json || { failed "vxd starts and answers its control socket"; show_logs; verdict; poweroff -f; }
}

# As its unit runs it: a user of its own with two capabilities. For the starts of vxd that follow.
run_vxd_unprivileged() {
  VXD_AS="/bin/setpriv --reuid=990 --regid=990 --clear-groups --no-new-privs --inh-caps=-all,+dac_override,+net_admin \
    --ambient-caps=-all,+dac_override,+net_admin --bounding-set=-all,+dac_override,+net_admin"
  mkdir -p /run/vxd
  chown 990:990 /run/vxd
}

profiles() { # JSON : options of disks, for the next start of vxd
  printf '{"version": 1, "disks": [%s]}\n' "$1" >/etc/vxd/profiles.json
}

stop_vxd() {
  kill -TERM "$(vxd_pid)"
  wait "$(vxd_pid)"
}

threads_of_vxd() { ls "/proc/$(vxd_pid)/task" | wc -l; }
descriptors_of_vxd() { ls "/proc/$(vxd_pid)/fd" | wc -l; }
no_descriptor_left() { wait_until 10 has_descriptors "$DESCRIPTORS" || { ls -l "/proc/$(vxd_pid)/fd"; return 1; }; }
has_descriptors() { [ "$(descriptors_of_vxd)" = "$1" ]; }
mappings_of_vxd() { grep -c -E 'privcmd|gntdev' "/proc/$(vxd_pid)/maps"; }

# One field of `vxctl status --json`, for instance: status_field ioreqServers
status_field() { vxctl status --json | tr ',{}' '\n\n\n' | sed -n "s/.*\"$1\": *\"\{0,1\}\([^\"]*\)\"\{0,1\} *$/\1/p" | head -n 1; }
device_state() { vxctl show "$1" --json | tr ',{}' '\n\n\n' | sed -n 's/.*"state": *"\([^"]*\)".*/\1/p' | head -n 1; }
device_state_is() { equal "$(device_state "$1")" "$2"; }

remember_resources() {
  THREADS=$(threads_of_vxd)
  DESCRIPTORS=$(descriptors_of_vxd)
  WATCHES=$(status_field xenstoreWatches)
}

no_trace_left() { # every resource that guests cost is back at what remember_resources saw
  check "no domain but dom0 is left, and no zombie" equal "$(xl list | wc -l)" 2
  check "no ioreq server is left" equal "$(status_field ioreqServers)" 0
  check "no guest page is mapped" equal "$(mappings_of_vxd)" 0
  check "the pools count no mapped page" equal "$(status_field mappedPages)" 0
  check "no thread is left" equal "$(threads_of_vxd)" "$THREADS"
  # That of the last question has to be noticed as closed first.
  check "no descriptor is left" no_descriptor_left
  check "no watch is left" equal "$(status_field xenstoreWatches)" "$WATCHES"
  check "no backend node is left in Xenstore" not xenstore-exists /local/domain/0/backend/virtio_disk
}

# Guests

make_disk() { # PATH MIB
  mkdir -p "$(dirname "$1")"
  dd if=/dev/zero of="$1" bs=1M count=0 seek="$2" 2>/dev/null
}

disk() { # VDEV PATH [ACCESS] : a disk for write_config
  echo "\"format=raw, vdev=$1, access=${3:-rw}, backendtype=standalone, specification=virtio, target=$2\""
}

write_config() { # NAME KERNEL_WORDS DISK... : an ordinary xl configuration of an HVM guest, or of a guest on Arm
  name=$1 words=$2
  shift 2
  disks=
  for entry in "$@"; do disks="$disks${disks:+, }$entry"; done
  [ "$ARCHITECTURE" = amd64 ] || { write_arm64_config; return; }
  cp /guest/boot.img "/disks/boot-$name.img"
  printf '%-480s' "console=hvc0 rdinit=/init loglevel=4 no_timer_check vx.seed=$DELAY $words" |
    dd of="/disks/boot-$name.img" bs=1 seek="$(cat /guest/boot.img.offset)" conv=notrunc 2>/dev/null
  cat >"/root/$name.cfg" <<CONFIG
name = "$name"
type = "hvm"
memory = ${GUEST_MEMORY:-200}
vcpus = ${GUEST_VCPUS:-1}
tsc_mode = "${GUEST_TSC:-native}"
device_model_args_hvm = [ "-drive", "if=none,id=boot,format=raw,file=/disks/boot-$name.img",
  "-device", "ich9-ahci,id=ahci", "-device", "ide-hd,drive=boot,bus=ahci.0" ]
acpi_firmware = "/etc/vxd/slots.aml"
vga = "none"
nographic = 1
vnc = 0
usb = 0
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
disk = [ $disks ]
$(virtio_line)
CONFIG
}

# Of write_config's: no type, no slots, and no disk to boot from.
write_arm64_config() {
  cat >"/root/$name.cfg" <<CONFIG
name = "$name"
kernel = "/guest/Image"
ramdisk = "/guest/guest.cpio.gz"
extra = "console=hvc0 rdinit=/init loglevel=4 vx.seed=$DELAY $words"
memory = ${GUEST_MEMORY:-200}
vcpus = ${GUEST_VCPUS:-1}
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
disk = [ $disks ]
$(virtio_line)
CONFIG
}

# Generic devices of the guest's, in GUEST_VIRTIO by their type's number: libxl's since 4.18.
virtio_line() {
  [ -n "${GUEST_VIRTIO:-}" ] || return
  printf 'virtio = ['
  for type in $GUEST_VIRTIO; do printf ' "type=virtio,device%s,transport=mmio%s",' "$type" "$([ "$ARCHITECTURE" = amd64 ] || echo ,grant_usage=0)"; done
  echo ' ]'
}

# What a PV or PVH guest boots from, in lines of its configuration. Guests on Arm have no type.
direct_boot() { # TYPE RAMDISK
  if [ "$ARCHITECTURE" = amd64 ]; then
    printf 'type = "%s"\nkernel = "/guest/vmlinux"\nramdisk = "%s"\ntsc_mode = "%s"\n' "$1" "$2" "${GUEST_TSC:-native}"
  else
    [ -e "$2" ] || set -- "$1" "$2.gz"
    printf 'kernel = "/guest/Image"\nramdisk = "%s"\n' "$2"
  fi
}

# A PV or PVH guest, or one on Arm, whose devices come over Xenbus.
write_direct_config() { # TYPE NAME KERNEL_WORDS DISK...
  type=$1 name=$2 words=$3
  shift 3
  disks=
  for entry in "$@"; do disks="$disks${disks:+, }$entry"; done
  cat >"/root/$name.cfg" <<CONFIG
name = "$name"
$(direct_boot "$type" /guest/guest.cpio)
extra = "console=hvc0 rdinit=/init loglevel=4 vx.bus=xenbus vx.seed=$DELAY $words"
memory = ${GUEST_MEMORY:-220}
vcpus = ${GUEST_VCPUS:-1}
on_poweroff = "destroy"
on_reboot = "restart"
on_crash = "destroy"
disk = [ $disks ]
$(virtio_line)
CONFIG
}

driver_disk() { # VDEV TARGET [ACCESS] : a disk from the driver domain
  echo "\"format=raw, vdev=$1, access=${3:-rw}, backend=driver, backendtype=standalone, specification=virtio, target=$2\""
}

write_driver_config() { # TYPE RAMDISK WORDS MEMORY ON_REBOOT
  cat >/root/driver.cfg <<CONFIG
name = "driver"
$(direct_boot "$1" "$2")
extra = "console=hvc0 rdinit=/init loglevel=4 $3"
memory = $4
vcpus = 1
driver_domain = 1
max_event_channels = 2047
on_poweroff = "destroy"
on_reboot = "$5"
on_crash = "destroy"
CONFIG
}

# A driver domain: an ordinary guest without any right over others, with vxd in it. DRIVER_MORE: an archive that its RAM disk gets too.
create_driver_domain() { # [TYPE]
  cat /guest/driver.cpio /guest/vxd.cpio ${DRIVER_MORE:-} >/root/driver-ramdisk
  write_driver_config "${1:-pvh}" /root/driver-ramdisk "" 320 restart
  create driver && wait_console driver "DRIVER UP" 120
}

# Runs a command in the driver domain; its output is ours, and so is its exit code.
in_driver() { # COMMAND...
  driver=/local/domain/$(xl domid driver)/data
  number=$(($(cat /run/driver-number 2>/dev/null || echo 0) + 1))
  echo $number >/run/driver-number
  xenstore-write "$driver/command" "$number $*"
  wait_until "${DRIVER_LIMIT:-60}" driver_did $number || return 1
  xenstore-read "$driver/output" | tr '~' '\n'
  return "$(xenstore-read "$driver/result" | cut -d' ' -f2)"
}
driver_did() { xenstore-read "$driver/result" 2>/dev/null | grep -q "^$1 "; }

# Runs a command in a guest that serves (vx.test=serve), over the pty of its port; its output is ours, and so is its exit code.
in_guest() { # NAME COMMAND...
  local guest=$1 number code line
  shift
  number=$(($(cat /run/guest-number 2>/dev/null || echo 0) + 1))
  echo $number >/run/guest-number
  # A redirection of exec that fails ends the whole shell.
  (exec 8<>"/run/$guest.command") 2>/dev/null || return 1
  exec 8<>"/run/$guest.command"
  echo "$number $*" >&8
  code=124
  while IFS= read -r -t "${GUEST_LIMIT:-60}" line <&8; do
    case $line in
      "$number done "*) code=${line##* }; break ;;
      \|*) printf '%s\n' "${line#|}" ;;
    esac
  done
  exec 8>&-
  return "$code"
}

# One field of `vxctl show GUEST/DEVICE --json`, the first of its name.
device_field() { vxctl show "$1" --json | tr ',{}' '\n\n\n' | sed -n "s/.*\"$2\": *\"\{0,1\}\([^\"]*\)\"\{0,1\} *$/\1/p" | head -n 1; }

create() { # NAME [OPTION]
  # What an earlier guest of this name said is kept apart.
  [ ! -e "$(console_of "$1")" ] || mv "$(console_of "$1")" "/var/log/xen/earlier-$1-$(domid_of "$1").log"
  rm -f "/run/domid-$1"
  xl create ${2:+"$2"} "/root/$1.cfg" >"/tmp/xl-$1.out" 2>&1 || { cat "/tmp/xl-$1.out"; return 1; }
  xl domid "$1" >"/run/domid-$1"
}
console_of() { echo "/var/log/xen/guest-$1.log"; }
console_says() { grep -q "$2" "$(console_of "$1")" 2>/dev/null; }
console_says_or_ended() { console_says "$1" "$2" || [ -z "$(domid_of "$1")" ] || ! xenstore-exists "/local/domain/$(domid_of "$1")"; }
domid_of() { cat "/run/domid-$1" 2>/dev/null; }
wait_console() { # NAME PATTERN SECONDS : also ends when the guest does
  wait_until "$3" console_says_or_ended "$1" "$2"
  console_says "$1" "$2" || { tail -n 30 "$(console_of "$1")"; return 1; }
}
domain_gone() { ! xl list "$1" >/dev/null 2>&1 && ! xl list | grep -q null; }
wait_gone() { wait_until "$2" domain_gone "$1"; }
guest_says_nothing_bad() { ! grep -E "GUEST FAIL|I/O error|Oops|BUG:|nobody cared|hung task" "$(console_of "$1")"; }
equal_now() { equal "$(status_field "$1")" "$2"; }

# How Xen numbers the next guests: "random", or "xen", which counts on from the last one that it numbered itself.
number_domains() { printf 'autoballoon="off"\ndomid_policy="%s"\n' "$1" >/etc/xen/xl.conf; }

# Memory, for guests that say "GUEST ROUND" after each round of I/O

memory_of() { xl list "$1" | awk 'NR == 2 {print $3}'; }
memory_is_at_most() { test "$(memory_of "$1")" -le "$2"; }
memory_is_at_least() { test "$(memory_of "$1")" -ge "$2"; }
rounds_of() { grep -c 'GUEST ROUND' "$(console_of "$1")"; }
has_rounds() { test "$(rounds_of "$1")" -ge "$2"; }
rounds_more() { # NAME COUNT : so many rounds from now
  wait_until 200 has_rounds "$1" $(($(rounds_of "$1") + $2)) || { tail -n 20 "$(console_of "$1")"; return 1; }
}
# Of test_xenbus, whose rounds name their disks.
last_round_has() { grep 'GUEST ROUND' "$(console_of "$1")" | tail -n 1 | grep -q "$2"; }

# Down from 240 MiB and up again, with rounds of I/O at both sizes; ends early when the guest finds its data corrupt. The balloon
# stops before what it is told, since the guest is busy with its memory: SMALL is what counts as down, in MiB.
balloon() { # NAME TIMES SMALL
  for turn in $(seq "$2"); do
    xl mem-set "$1" 150 && wait_until 120 memory_is_at_most "$1" "$3" || { echo "it has $(memory_of "$1") MiB"; return 1; }
    wait_until 200 has_rounds "$1" $(($(rounds_of "$1") + 1)) || return 1
    xl mem-set "$1" 240 && wait_until 120 memory_is_at_least "$1" 225 || { echo "it has $(memory_of "$1") MiB"; return 1; }
    wait_until 200 has_rounds "$1" $(($(rounds_of "$1") + 2)) || return 1
    ! console_says "$1" CORRUPT || return 0
  done
}
