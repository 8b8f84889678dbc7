# QEMU for the testbed, built from Debian's source with one line added and without all that the machines here do not have. Plugins are on for
# `make compare`, which counts instructions by one.
#
# QEMU's VMRUN (target/i386/tcg/sysemu/svm_helper.c, as of 7.2) delivers the interrupt that the hypervisor injects and leaves its vector in
# exception_index. When the processor's time slice ends before the next exit from the guest, the vector is taken for an exception that is
# still to be delivered: the guest gets the interrupt twice, the second time within the entry code of the first, with interrupts off. Linux
# then overruns its entry stack ("ENTRY_TRAMPOLINE stack guard page was hit") or dies of a triple fault.

EMULATOR_FIX='/^ *do_interrupt_x86_hardirq(env, vector, 1);$/a cs->exception_index = -1;'

EMULATOR=$CACHE/qemu-7.2-2/qemu-system-x86_64

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
