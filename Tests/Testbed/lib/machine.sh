# Boots Xen with dom0 in QEMU, purely emulated, with a clock that counts instructions.
#
# One thread of this machine executes all emulated processors in turn, and the emulated clock advances by 2^shift nanoseconds an
# instruction (-icount): a run of the same images takes the same virtual time and comes to the same result, whatever else this machine
# does; idle time is skipped. So limits are in virtual time, and another interleaving comes from other numbers (choose_variation).
# A scenario that needs processors in parallel says "# parallel: yes" and gets a thread for each, in real time.

MACHINE_MEMORY=2800
# The emulated clock's day: as good as any, and always the same.
MACHINE_DATE=2026-01-01T00:00:00

overlay() { # FOLDER SCENARIO_FILE : what changes from run to run: vxd, vxctl, the scenario
  local folder=$1
  PACKAGES_ROOT=${PACKAGES_ROOT:?}
  mkdir -p "$folder/bin" "$folder/etc/vxd" "$folder/lib"
  add_vxd "$folder"
  cp "$REPO/deploy/acpi/slots.aml" "$folder/etc/vxd/"
  cp "$TESTBED/dom0/lib.sh" "$folder/testbed-lib.sh"
  printf 'RELEASE=%s\nARCHITECTURE=%s\nDELAY=%s\nLIMIT=%s\n' "${RELEASE/arm64/trixie}" "$([ "$RELEASE" = arm64 ] && echo arm64 || echo amd64)" \
    "${DELAY:-0}" "${LIMIT:-3600}" >"$folder/testbed-run.sh"
  [ -z "$2" ] || cp "$2" "$folder/scenario.sh"
  ! needs_debian "$2" || add_debian "$folder"
  ! needs_stock "$2" || add_stock "$folder"
  ! needs_appliance "$2" || add_appliance "$folder"
  ! needs_spice "$2" || add_spice "$folder"
  needs_xenbus "$2" || return 0
  mkdir -p "$folder/guest" "$folder/driver"
  add_vxd "$folder/driver"
  pack "$folder/driver" "$folder/guest/vxd.cpio"
  rm -rf "$folder/driver"
}

add_vxd() { # FOLDER : as they are shipped
  local name
  for name in vxd vxctl; do
    copy_with_libraries "$1" "$BINARIES/$name" "/bin/$name"
    "$([ "$RELEASE" = arm64 ] && echo aarch64-linux-gnu-)strip" "$1/bin/$name"
  done
}

# As it is shipped, where its configuration says: /usr/lib is /lib here.
add_appliance() { # FOLDER
  [ -e "$APPLIANCE/SHA256SUMS" ] || die "the scenario wants the appliance, and there is none in $APPLIANCE: run 'make appliance' first"
  mkdir -p "$1/lib/vxd-appliance"
  cp "$APPLIANCE"/{vmlinuz,initramfs,vxd-appliance.cfg} "$1/lib/vxd-appliance/"
}

needs_appliance() { [ -n "$1" ] && grep -q '^# needs: .*appliance' "$1"; }
needs_compare() { [ -n "$1" ] && grep -q '^# needs: compare' "$1"; }
needs_xenbus() { [ -n "$1" ] && grep -q '^# needs: .*xenbus' "$1"; }

# Variation 0 is the run that has no number. Others start the scenario a little later (DELAY, microseconds), and every second one has a
# clock that is twice as fast or slow against the processors: timers, and so preemption, meet other instructions.
choose_variation() { # NUMBER : sets SHIFT and DELAY
  DELAY=$(($1 * 7919 % 100000))
  case $(($1 % 4)) in
    1) SHIFT=0 ;;
    3) SHIFT=2 ;;
    *) SHIFT=1 ;;
  esac
}

# Its console on standard output; what dom0 sends by its second serial port goes to FOLDER/logs.tar.gz. Its monitor is FOLDER/monitor: a name
# of its own folder, since a socket's name has at most 107 characters.
boot() { # INITRD FOLDER [COMMAND...] : becomes the machine, run by a command
  [ "$RELEASE" != arm64 ] || boot_arm64 "$@"
  local initrd=$1 folder=$2
  shift 2
  local clock=(-accel "tcg,thread=single" -icount "shift=${SHIFT:-1},sleep=off" -rtc "base=$MACHINE_DATE,clock=vm")
  [ "${PARALLEL:-no}" = no ] || clock=(-accel "tcg,thread=multi")
  local disk=() init=/init
  # dom0's disk, and one of the same content for a driver domain. What is written goes to snapshots in the machine's own folder.
  [ -z "${DISK:-}" ] || { init=/debian-init; export TMPDIR=$folder; disk=(-drive "if=none,id=root,format=raw,snapshot=on,file=$DISK" -device "ide-hd,drive=root,bus=ide.0"
    -drive "if=none,id=second,format=raw,snapshot=on,file=$DISK" -device "ide-hd,drive=second,bus=ide.1"); }
  # That of a guest, as dom0's only one.
  [ -z "${STOCK:-}" ] || { export TMPDIR=$folder; disk+=(-drive "if=none,id=stock,format=raw,snapshot=on,file=$STOCK/disk.img" -device "ide-hd,drive=stock,bus=ide.0"); }
  # One for dom0, and one for its guest.
  [ -z "${SPICE:-}" ] || { export TMPDIR=$folder; disk+=(-drive "if=none,id=spice,format=raw,snapshot=on,file=$SPICE" -device "ide-hd,drive=spice,bus=ide.0"
    -drive "if=none,id=agent,format=raw,snapshot=on,file=$SPICE" -device "ide-hd,drive=agent,bus=ide.1"); }
  # Counts what is between marks in the guest; elsewhere there are none.
  [ -z "${PLUGIN:-}" ] || clock+=(-plugin "$PLUGIN,out=counts")
  cd "$folder" || exit 1
  exec "$@" "$EMULATOR" -L /usr/share/qemu -L /usr/share/seabios -machine q35 "${clock[@]}" -cpu qemu64,+svm,+npt -smp "${MACHINE_CPUS:-4}" -m "$MACHINE_MEMORY" \
    -monitor unix:monitor,server=on,wait=off -serial stdio -serial file:logs.tar.gz -no-reboot -nodefaults -display none \
    -kernel "$IMAGES/xen" -append "console=com1 com1=115200,8n1 dom0_mem=1500M,max:1500M dom0_max_vcpus=${DOM0_CPUS:-2} dom0_vcpus_pin bootscrub=0 loglvl=warning guest_loglvl=warning" \
    -initrd "$IMAGES/vmlinuz console=hvc0 rdinit=$init quiet,$initrd" "${disk[@]}"
}

prepare_initrd() { # SCENARIO_FILE FOLDER : sets INITRD
  local folder
  folder=$(mktemp -d)
  overlay "$folder" "$1"
  pack "$folder" "$2/overlay.cpio"
  rm -rf "$folder"
  INITRD=$2/initrd
  cat "$IMAGES/dom0.cpio" "$2/overlay.cpio" >"$INITRD"
  ! needs_xenbus "$1" || cat "$IMAGES/xenbus.cpio" >>"$INITRD"
  ! needs_compare "$1" || cat "$IMAGES/compare.cpio" >>"$INITRD"
  ! needs_stock "$1" || cat "$STOCK/net.cpio" >>"$INITRD"
}
