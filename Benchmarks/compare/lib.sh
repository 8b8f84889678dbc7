# What both parts are written with; sourced in dom0 behind the testbed's own.
part=block

# Runs a guest to its end and shows what it measured. Nobody polls: xl is woken by the guest's end.
guest() { # NAME TYPE DRIVER LINE
  cat >"/root/$1.cfg" <<CONFIG
name = "$1"
type = "$2"
kernel = "/guest/vmlinux"
ramdisk = "/guest/compare.cpio"
extra = "console=hvc0 rdinit=/init loglevel=4 c.driver=$3 c.part=$part"
memory = 256
vcpus = 1
cpus = "1"
tsc_mode = "native"
on_poweroff = "destroy"
on_reboot = "destroy"
on_crash = "destroy"
$4
CONFIG
  step "$1"
  # Some have to be seen to while they come up: BESIDE does that.
  [ -z "${BESIDE:-}" ] || $BESIDE "$1" &
  check "$1: xl" xl create -F "/root/$1.cfg"
  wait_gone "$1" 30
  sed -n "s/^RESULT/| RESULT $1/p" "$(console_of "$1")"
  check "$1: it measured" sh -c "grep -q ^RESULT '$(console_of "$1")' && ! grep -E 'FAIL|Oops|BUG:|I/O error' '$(console_of "$1")'"
}

# A PVH driver domain on a processor of its own.
driver_domain() {
  DRIVER_MORE=/guest/driver-compare.cpio
  check "a driver domain" create_driver_domain pvh
  check "on its processor" xl vcpu-pin driver all 2
}
