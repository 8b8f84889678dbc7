# Boots Xen with dom0 in QEMU (pure software emulation) and reads the verdict from its console.

# All of it must lie below 4 GiB, which on q35 means less than 2816 MiB: QEMU 7.2's emulation of SVM truncates the physical
# address of a VMCB above 4 GiB whenever the guest is not in long mode, and such a guest dies of a triple fault at random.
MACHINE_MEMORY=2800

overlay() { # FOLDER SCENARIO_FILE : what changes from run to run: vxd, vxctl, the scenario
  local folder=$1
  PACKAGES_ROOT=${PACKAGES_ROOT:?}
  mkdir -p "$folder/bin" "$folder/etc/vxd" "$folder/lib"
  copy_with_libraries "$folder" "$BINARIES/vxd" /bin/vxd
  copy_with_libraries "$folder" "$BINARIES/vxctl" /bin/vxctl
  cp "$REPO/deploy/acpi/slots.aml" "$folder/etc/vxd/"
  cp "$TESTBED/dom0/lib.sh" "$folder/testbed-lib.sh"
  echo "RELEASE=$RELEASE" >>"$folder/testbed-lib.sh"
  [ -z "$2" ] || cp "$2" "$folder/scenario.sh"
  needs_xenbus "$2" || return 0
  mkdir -p "$folder/guest" "$folder/driver"
  copy_with_libraries "$folder/driver" "$BINARIES/vxd" /bin/vxd
  copy_with_libraries "$folder/driver" "$BINARIES/vxctl" /bin/vxctl
  pack "$folder/driver" "$folder/guest/vxd.cpio.gz"
  rm -rf "$folder/driver"
}

needs_xenbus() { [ -n "$1" ] && grep -q '^# needs: xenbus' "$1"; }

# Four processors on any machine, or as many as the scenario says ("# processors: N"): dom0 keeps two, and each guest gets one of its own (write_config), since guests that take turns
# on a processor are lost more often.
boot() { # INITRD : becomes the machine, its console on standard output
  exec qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu qemu64,+svm,+npt -smp "${MACHINE_CPUS:-4}" -m "$MACHINE_MEMORY" \
    -nographic -monitor none -serial stdio -no-reboot -nodefaults -display none \
    -kernel "$IMAGES/xen" -append "console=com1 com1=115200,8n1 dom0_mem=1500M,max:1500M dom0_max_vcpus=2 dom0_vcpus_pin loglvl=warning guest_loglvl=warning" \
    -initrd "$IMAGES/vmlinuz console=hvc0 rdinit=/init quiet,$1"
}

prepare_initrd() { # SCENARIO_FILE FOLDER : sets INITRD
  local folder
  folder=$(mktemp -d)
  overlay "$folder" "$1"
  pack "$folder" "$2/overlay.cpio.gz"
  rm -rf "$folder"
  INITRD=$2/initrd
  cat "$IMAGES/dom0.cpio.gz" "$2/overlay.cpio.gz" >"$INITRD"
  ! needs_xenbus "$1" || cat "$IMAGES/xenbus.cpio.gz" >>"$INITRD"
}

# QEMU's emulation of SVM loses a guest now and then: it dies of a triple fault while its kernel boots, long before a disk of
# ours has mapped a page of it. dom0 says so (lost_a_guest in dom0/lib.sh); such a run tells nothing and is repeated.
emulator_lost_a_guest() { grep -q '^TESTBED LOST' "$OUTPUT/$1/console.log"; }

run_scenario() { # NAME SECONDS : true when every check of it held
  local try
  for try in 1 2 3 4; do
    run_once "$1" "$2" && return 0
    emulator_lost_a_guest "$1" || return 1
    [ $try -eq 4 ] || say "scenario $1: the emulator lost a guest (a defect of QEMU's SVM emulation, see lib/machine.sh); again"
  done
  return 1
}

run_once() { # NAME SECONDS
  local name=$1 limit=$2 folder=$OUTPUT/$1 line started verdict=
  mkdir -p "$folder"
  prepare_initrd "$TESTBED/scenarios/${name%@*}.sh" "$folder"
  started=$SECONDS
  say "scenario $name (limit $limit s, console in $folder/console.log)"
  : >"$folder/console.log"
  set +o pipefail
  (boot "$INITRD" </dev/null 2>&1 & echo $! >"$folder/qemu.pid"; wait) |
    sed -u 's|\r*$||' | tee "$folder/console.log" |
    grep --line-buffered -E '^(STEP|ok - |not ok - |    |TESTBED |\| |GUEST)' &
  local reader=$!
  while kill -0 $reader 2>/dev/null && [ $((SECONDS - started)) -lt "$limit" ]; do
    grep -q '^TESTBED VERDICT' "$folder/console.log" && break
    read -r -t 1 <> <(:) || true
  done
  local waited=0
  while kill -0 $reader 2>/dev/null && [ $waited -lt 20 ] && grep -q '^TESTBED VERDICT' "$folder/console.log"; do
    read -r -t 1 <> <(:) || true
    waited=$((waited + 1))
  done
  kill "$(cat "$folder/qemu.pid")" 2>/dev/null || true
  wait $reader 2>/dev/null || true
  rm -f "$folder/initrd" "$folder/overlay.cpio.gz" "$folder/qemu.pid"
  verdict=$(sed -n 's/^TESTBED VERDICT //p' "$folder/console.log" | head -n 1)
  if [ -z "$verdict" ]; then
    say "scenario $name: no verdict within $limit s; the end of its console:"
    tail -n 60 "$folder/console.log"
    SCENARIO_VERDICT="no verdict"
    return 1
  fi
  SCENARIO_VERDICT="$verdict in $((SECONDS - started)) s"
  say "scenario $name: $SCENARIO_VERDICT"
  case $verdict in
    *" 0 failed") return 0 ;;
    *) sed -n '/^LOG/,$p' "$folder/console.log" | tail -n 400; return 1 ;;
  esac
}
