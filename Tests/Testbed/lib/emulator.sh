# QEMU for the testbed, built from Debian's source with two lines added and without all that the machines here do not have. Plugins are on for
# `make compare`, which counts instructions by one.
#
# QEMU's VMRUN (target/i386/tcg/sysemu/svm_helper.c, as of 7.2) delivers the interrupt that the hypervisor injects and leaves its vector in
# exception_index. When the processor's time slice ends before the next exit from the guest, the vector is taken for an exception that is
# still to be delivered: the guest gets the interrupt twice, the second time within the entry code of the first, with interrupts off. Linux
# then overruns its entry stack ("ENTRY_TRAMPOLINE stack guard page was hit") or dies of a triple fault.

# Under -icount a processor of the round may execute until the next timer is due (accel/tcg/tcg-accel-ops-icount.c, as of 7.2), and those behind
# it find nothing left when it does: one that spins for a lock keeps a third from ever handling the TLB flush that the lock's holder waits for, and the
# machine stands still. Each gets its share of the time that is left now, as in later versions of QEMU.

EMULATOR_FIX='/^ *do_interrupt_x86_hardirq(env, vector, 1);$/a cs->exception_index = -1;'
EMULATOR_SHARE='/^ *cpu->icount_budget = icount_get_limit();$/a \
    { CPUState *each; int64_t sharers = 0; CPU_FOREACH(each) { sharers++; } cpu->icount_budget = (cpu->icount_budget + sharers - 1) / sharers; }'

EMULATOR=$CACHE/qemu-7.2-3/qemu-system-x86_64

fetch_emulator() {
  local folder=${EMULATOR%/*}
  [ -x "$EMULATOR" ] && return
  need_command dpkg-source dpkg-dev
  need_command meson meson
  need_command ninja ninja-build
  say "building the emulator from Debian's source package of QEMU (some minutes, once)"
  rm -rf "$folder"
  mkdir -p "$folder"
  own_apt "$folder/apt" bookworm deb-src
  # shellcheck disable=SC2086
  (cd "$folder" && apt-get $APT source --download-only qemu) >"$folder/apt.log" 2>&1 ||
    die "the source of QEMU cannot be downloaded: $(tail -n 2 "$folder/apt.log")"
  (cd "$folder" && dpkg-source --no-check -x qemu_*.dsc source) >"$folder/build.log" 2>&1 ||
    die "the source of QEMU cannot be unpacked: $(tail -n 2 "$folder/build.log")"
  (
    cd "$folder/source" || exit 1
    sed -i "$EMULATOR_FIX" target/i386/tcg/sysemu/svm_helper.c
    sed -i "$EMULATOR_SHARE" accel/tcg/tcg-accel-ops-icount.c
    [ "$(grep -c 'sharers - 1) / sharers; }$' accel/tcg/tcg-accel-ops-icount.c)" = 1 ] || { echo "the round's code is not as expected"; exit 1; }
    [ "$(grep -c '^cs->exception_index = -1;$' target/i386/tcg/sysemu/svm_helper.c)" = 1 ] || { echo "VMRUN's code is not as expected"; exit 1; }
    echo CONFIG_Q35=y >configs/devices/x86_64-softmmu/testbed.mak
    ./configure --target-list=x86_64-softmmu --without-default-features --without-default-devices --with-devices-x86_64=testbed \
      --enable-system --enable-tcg --enable-plugins --enable-fdt=system --disable-install-blobs --disable-werror --meson="$(command -v meson)" &&
      ninja -C build qemu-system-x86_64
  ) >>"$folder/build.log" 2>&1 || die "QEMU cannot be built: $(tail -n 3 "$folder/build.log") (all of it: $folder/build.log)"
  strip -o "$EMULATOR.part" "$folder/source/build/qemu-system-x86_64"
  mv "$EMULATOR.part" "$EMULATOR"
  rm -rf "$folder/source" "$folder/apt"
}
