# Builds the images that the testbed boots: dom0's and the guest's, both a cpio archive that Linux unpacks into memory.
# They are cached by the content that they are made from.

# What PROGRAM is linked to, in lines of ldd's. Another release's loader answers for its own programs, and for ours in its place.
list_libraries() { # PROGRAM
  case $RELEASE in
    arm64) list_arm64_libraries "$1" ;;
    bookworm) LD_LIBRARY_PATH="$PACKAGES_ROOT/usr/lib/x86_64-linux-gnu:$PACKAGES_ROOT/lib/x86_64-linux-gnu" ldd "$1" 2>/dev/null ;;
    *)
      "$PACKAGES_ROOT/lib64/ld-linux-x86-64.so.2" --library-path "$PACKAGES_ROOT/usr/lib/x86_64-linux-gnu" --list "$1" 2>/dev/null |
        grep -v '^[[:space:]]*/lib64/'
      ;;
  esac
}

copy_with_libraries() { # IMAGE PROGRAM DESTINATION : a program and what it is linked to
  local image=$1 program=$2 destination=$3 library
  install -D -m 755 "$program" "$image$destination"
  list_libraries "$program" |
    awk '/not found/ {print "missing:" $1} $2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\// {print $1}' |
    while read -r library; do
      case $library in
        missing:*) die "$program needs ${library#missing:}, which neither this machine nor the cache has" ;;
        /lib64/*) install -D -m 755 "$library" "$image$library" ;;
        *) [ -e "$image/lib/$(basename "$library")" ] || install -D -m 755 "$library" "$image/lib/$(basename "$library")" ;;
      esac
    done || exit 1
}

copy_modules() { # IMAGE NAME... : kernel modules into /modules, without their folders; what the kernel has built in is none
  local image=$1 name file
  shift
  mkdir -p "$image/modules"
  for name in "$@"; do
    file=$(find "$PACKAGES_ROOT/lib/modules/" -name "$name.ko" -o -name "$name.ko.xz" | head -n 1)
    case $file in
      *.ko) cp "$file" "$image/modules/" ;;
      *.xz) xz -dc "$file" >"$image/modules/$name.ko" ;;
      *)
        grep -q "/$name.ko$" "$PACKAGES_ROOT"/lib/modules/*/modules.builtin || die "the kernel package has no module $name"
        touch "$image/modules/$name.builtin"
        ;;
    esac
  done
}

base_image() { # IMAGE : folders and busybox
  mkdir -p "$1"/{bin,sbin,lib,etc,proc,sys,dev,run,tmp,var/log,var/lib,root,lib64,usr}
  # mktemp keeps others out of the root, and so out of everything.
  chmod 755 "$1"
  install -m 755 "$PACKAGES_ROOT/bin/busybox" "$1/bin/busybox"
  ln -s busybox "$1/bin/sh"
  ln -s ../lib "$1/usr/lib"
  [ "$RELEASE" != arm64 ] || {
    install -m 755 "$PACKAGES_ROOT/usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1" "$1/lib/"
    install -m 755 "$PACKAGES_ROOT/usr/lib/aarch64-linux-gnu/libgcc_s.so.1" "$1/lib/"
    return
  }
  [ "$RELEASE" = bookworm ] || {
    install -D -m 755 "$PACKAGES_ROOT/lib64/ld-linux-x86-64.so.2" "$1/lib64/ld-linux-x86-64.so.2"
    # glibc loads it when a thread is cancelled, as iperf3 does from 3.16 on.
    install -m 755 "$PACKAGES_ROOT/usr/lib/x86_64-linux-gnu/libgcc_s.so.1" "$1/lib/"
  }
}

# Not compressed: unpacking costs the emulated processors seconds. The same content makes the same archive.
pack() { # FOLDER ARCHIVE
  find "$1" -exec touch -h -d "$MACHINE_DATE" {} +
  (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --null --quiet --reproducible -o -H newc -R 0:0) >"$2.part" || die "cannot write $2"
  mv "$2.part" "$2"
}

# The guest module, built against the headers of the kernel that the guests boot, with the compiler of their release. Sets MODULE.
build_guest_module() {
  local folder=$PACKAGES_ROOT/tmp/module
  need_command gcc gcc
  need_command make make
  rm -rf "$folder"
  mkdir -p "$folder"
  cp "$REPO"/deploy/guest-module/* "$folder/"
  case $RELEASE in
    bookworm) make -C "$PACKAGES_ROOT"/usr/src/linux-headers-"$LINUX_VERSION"*-amd64 M="$folder" W=1 modules ;;
    # More warnings would want kernel-doc's Perl.
    *) LC_ALL=C chroot "$PACKAGES_ROOT" /bin/sh -c "make -C /usr/src/linux-headers-$LINUX_VERSION*-amd64 M=/tmp/module modules" ;;
  esac >"$IMAGES/module.log" 2>&1 || die "the guest module does not build: $(grep -m 3 -i error "$IMAGES/module.log")"
  ! grep -i -A 3 'warning:' "$IMAGES/module.log" || die "the guest module builds with warnings"
  MODULE=$IMAGES/virtio_xenbus.ko
  strip --strip-debug -o "$MODULE" "$folder/virtio_xenbus.ko"
  rm -rf "$folder"
}

build_guest_image() { # ARCHIVE
  local image
  image=$(mktemp -d)
  base_image "$image"
  copy_with_libraries "$image" "$PACKAGES_ROOT/sbin/mke2fs" /sbin/mkfs.ext4
  install -m 755 "$FIO" "$image/bin/fio"
  copy_modules "$image" virtio_ring virtio virtio_mmio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk crc16 mbcache jbd2 crc32c_generic libcrc32c ext4 \
    failover net_failover virtio_net virtio_console virtio-rng garp mrp llc stp 8021q
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/sbin/qemu-ga" /bin/qemu-ga
  cp "$MODULE" "$image/modules/"
  # Whatever the guest's release is, it needs nothing of it.
  gcc -O2 -Wall -Wextra -Werror -static -s -o "$image/bin/hostile-pci" "$TESTBED/guest/hostile-pci.c" || die "the hostile guest program does not build"
  cp "$TESTBED"/guest/{init,tests.sh,mke2fs.conf} "$image/"
  mv "$image/mke2fs.conf" "$image/etc/"
  chmod 755 "$image/init"
  pack "$image" "$1"
  rm -rf "$image"
}

# A disk image with a boot loader, for QEMU's AHCI controller in the guest. Xen's QEMU feeds `kernel=` of an xl
# configuration to the guest byte by byte through an I/O port, which takes minutes under emulation; AHCI copies it.
# The scenario writes the kernel's command line over the row of '#'.
build_boot_image() { # IMAGE GUEST_ARCHIVE
  local folder
  folder=$(mktemp -d)
  ln -s "$TOOLS_ROOT/usr/bin/mtools" "$folder/mcopy"
  ln -s "$TOOLS_ROOT/usr/bin/mtools" "$folder/mattrib"
  ln -s "$TOOLS_ROOT/usr/bin/mtools" "$folder/mformat"
  ln -s "$TOOLS_ROOT/usr/bin/mtools" "$folder/mmove"
  {
    printf 'default guest\nprompt 0\nlabel guest\n kernel vmlinuz\n initrd initrd.gz\n append '
    printf '#%.0s' $(seq 480)
    printf '\n'
  } >"$folder/syslinux.cfg"
  truncate -s 32M "$1"
  (
    export PATH="$folder:$PATH"
    mformat -i "$1" -T 65536 -h 16 -s 63 :: && mcopy -i "$1" "$IMAGES/vmlinuz" ::vmlinuz &&
      gzip -1 -n -c "$2" >"$folder/initrd.gz" && mcopy -i "$1" "$folder/initrd.gz" ::initrd.gz && mcopy -i "$1" "$folder/syslinux.cfg" ::syslinux.cfg &&
      "$TOOLS_ROOT/usr/bin/syslinux" --install "$1"
  ) >"$folder/log" 2>&1 || die "cannot make the guest's boot disk: $(tail -n 3 "$folder/log")"
  LC_ALL=C grep -abo '########' "$1" | head -n 1 | cut -d: -f1 >"$1.offset"
  rm -rf "$folder"
}

# A driver domain: vxd comes with each run (machine.sh), the rest is here.
build_driver_image() { # ARCHIVE
  local image tool
  image=$(mktemp -d)
  base_image "$image"
  for tool in xenstore-read xenstore-write xenstore-watch xenstore-ls; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"
  done
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_modules "$image" xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop llc stp bridge tun
  cp "$TESTBED"/driver/* "$image/"
  chmod 755 "$image/init"
  pack "$image" "$1"
  rm -rf "$image"
}

# What is behind the loader in a kernel's image. It ends with the length of what it was, which unpackers complain about.
unpack_kernel() { # IMAGE
  local offset
  case $RELEASE in
    bookworm)
      offset=$(LC_ALL=C grep -abo -P '\xFD7zXZ\x00' "$1" | head -n 1 | cut -d: -f1)
      tail -c "+$((offset + 1))" "$1" | xz -dc 2>/dev/null
      ;;
    *)
      offset=$(LC_ALL=C grep -abo -P '\x28\xB5\x2F\xFD' "$1" | head -n 1 | cut -d: -f1)
      tail -c "+$((offset + 1))" "$1" | chroot "$PACKAGES_ROOT" /bin/zstd -dc 2>/dev/null
      ;;
  esac
}

# What PV and PVH guests boot from, for scenarios that say "# needs: xenbus": the kernel unpacked, which xl would need seconds for.
build_xenbus_image() { # ARCHIVE GUEST_ARCHIVE
  local image
  image=$(mktemp -d)
  mkdir "$image/guest"
  unpack_kernel "$IMAGES/vmlinuz" >"$image/guest/vmlinux"
  [ "$(head -c 4 "$image/guest/vmlinux" | tail -c 3)" = ELF ] || die "the kernel cannot be unpacked"
  cp "$2" "$image/guest/guest.cpio"
  build_driver_image "$image/guest/driver.cpio"
  pack "$image" "$1"
  rm -rf "$image"
}

# What `make compare` measures with, for scenarios that say "# needs: compare": its guest, and what dom0 and the driver domain need beside.
build_compare_image() { # ARCHIVE
  local image guest driver folder tool
  image=$(mktemp -d) guest=$(mktemp -d) driver=$(mktemp -d)
  gcc -O2 -Wall -Werror -static -o "$IMAGES/aiorand" "$COMPARE/aiorand.c" -laio || die "aiorand does not build (libaio-dev is missing? run: make deps)"
  gcc -O2 -Wall -Werror -static -o "$IMAGES/packets" "$COMPARE/packets.c" || die "packets does not build"
  gcc -O2 -Wall -Werror -shared -fPIC -o "$IMAGES/counts.so" "$COMPARE/counts.c" || die "the plugin that counts does not build"
  base_image "$guest"
  install -m 755 -t "$guest/bin" "$IMAGES/aiorand" "$IMAGES/packets"
  copy_with_libraries "$guest" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_modules "$guest" virtio_ring virtio virtio_mmio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk failover net_failover virtio_net \
    xen-blkfront xen-netfront
  cp "$MODULE" "$guest/modules/"
  install -m 755 "$COMPARE/guest-init" "$guest/init"
  for folder in "$image" "$driver"; do
    copy_modules "$folder" brd xen-blkback xen-netback
    install -D -m 755 -t "$folder/compare" "$COMPARE"/hotplug-*
    cp "$COMPARE"/*lib.sh "$folder/compare/"
    install -D -m 755 -t "$folder/bin" "$IMAGES/packets"
  done
  copy_with_libraries "$driver" "$PACKAGES_ROOT/usr/bin/xenstore-list" /bin/xenstore-list
  mkdir -p "$image/guest" "$image/etc/xen/scripts"
  cp "$image/compare/hotplug-block" "$image/etc/xen/scripts/block"
  cp "$image/compare/hotplug-vif" "$image/etc/xen/scripts/vif-bridge"
  pack "$guest" "$image/guest/compare.cpio"
  build_boot_image "$image/guest/compare.img" "$image/guest/compare.cpio"
  pack "$driver" "$image/guest/driver-compare.cpio"
  pack "$image" "$1"
  rm -rf "$image" "$guest" "$driver"
}

# Open vSwitch. Bookworm's list of packages is without what it depends on.
add_virtual_switch() { # IMAGE
  local tool
  for tool in ovs-vsctl ovsdb-tool; do copy_with_libraries "$1" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"; done
  copy_with_libraries "$1" "$PACKAGES_ROOT/usr/sbin/ovsdb-server" /sbin/ovsdb-server
  copy_with_libraries "$1" "$PACKAGES_ROOT/usr/lib/openvswitch-switch/ovs-vswitchd" /sbin/ovs-vswitchd
  install -D -m 644 "$PACKAGES_ROOT/usr/share/openvswitch/vswitch.ovsschema" "$1/usr/share/openvswitch/vswitch.ovsschema"
  copy_modules "$1" nf_defrag_ipv4 nf_defrag_ipv6 crc32c_generic libcrc32c nf_conntrack nf_nat nf_conncount nsh psample openvswitch
}

build_dom0_image() { # ARCHIVE GUEST_ARCHIVE
  local image tool setpriv
  image=$(mktemp -d)
  base_image "$image"
  for tool in xl xenstored xenconsoled xenconsole xen-init-dom0 libxl-save-helper lsevtchn; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/lib/xen-$XEN_VERSION/bin/$tool" "/usr/lib/xen-$XEN_VERSION/bin/$tool"
  done
  for tool in xenstore-ls xenstore-read xenstore-write xenstore-rm xenstore-list xenstore-exists xenstore-watch; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"
  done
  ln -s ../lib/xen-$XEN_VERSION/bin/xl "$image/sbin/xl"
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/libexec/xen-qemu-system-i386" /usr/libexec/xen-qemu-system-i386
  # util-linux is on every Debian system.
  setpriv=$PACKAGES_ROOT/usr/bin/setpriv
  [ -x "$setpriv" ] || setpriv=/usr/bin/setpriv
  copy_with_libraries "$image" "$setpriv" /bin/setpriv
  for tool in qemu-storage-daemon qemu-img; do copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"; done
  install -D "$PACKAGES_ROOT/usr/lib/xen-$XEN_VERSION/boot/hvmloader" "$image/usr/lib/xen-$XEN_VERSION/boot/hvmloader"
  install -D "$PACKAGES_ROOT/usr/share/seabios/bios-256k.bin" "$image/usr/share/seabios/bios-256k.bin"
  mkdir -p "$image/usr/share/qemu/keymaps"
  cp "$PACKAGES_ROOT/usr/share/qemu/kvmvapic.bin" "$image/usr/share/qemu/"
  cp "$PACKAGES_ROOT"/usr/share/qemu/keymaps/en-us "$image/usr/share/qemu/keymaps/"
  cp -L "$PACKAGES_ROOT"/usr/share/seabios/vgabios-stdvga.bin "$image/usr/share/seabios/"
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_modules "$image" xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop tun llc stp bridge garp mrp 8021q \
    veth macvlan tap macvtap
  [ "$RELEASE" = bookworm ] || add_virtual_switch "$image"
  mkdir -p "$image/guest"
  build_boot_image "$image/guest/boot.img" "$2"
  install -m 755 "$TESTBED/dom0/init" "$image/init"
  gcc -O2 -Wall -Werror -o "$IMAGES/hostile-backend" "$TESTBED/dom0/hostile-backend.c" -lxengnttab -lxenevtchn -lxenstore ||
    die "the hostile backend does not build (libxen-dev is missing? run: make deps)"
  copy_with_libraries "$image" "$IMAGES/hostile-backend" /bin/hostile-backend
  gcc -O2 -Wall -Werror -static -s -o "$image/bin/handles" "$TESTBED/dom0/handles.c" || die "the program that tries open files does not build"
  pack "$image" "$1"
  rm -rf "$image"
}

# One at a time: others may prepare theirs in the same cache.
prepare_images() { # [RELEASE] : sets IMAGES, and what choose_release sets
  local lock
  need_command cpio cpio
  need_command xz xz-utils
  mkdir -p "$CACHE" || die "cannot write to the cache folder $CACHE (set VXD_CACHE to another one)"
  exec {lock}>"$CACHE/lock"
  flock --timeout 1800 "$lock" || die "another testbed has been preparing its images in $CACHE for half an hour"
  prepare_images_alone "$@"
  exec {lock}>&-
}

prepare_images_alone() { # [RELEASE]
  # Bookworm's packages are needed in any case: its programs run on this machine too.
  choose_release bookworm
  fetch_packages
  TOOLS_ROOT=$PACKAGES_ROOT
  fetch_fio
  fetch_emulator
  if [ "${1:-bookworm}" != bookworm ]; then
    choose_release "$1"
    fetch_packages
  fi
  local key
  key=$( (echo "$PACKAGES_ROOT"; cat "$TESTBED"/lib/images.sh "$TESTBED"/lib/arm64.sh "$TESTBED"/dom0/init "$TESTBED"/dom0/*.c "$TESTBED"/guest/* "$TESTBED"/driver/* "$COMPARE"/*.{c,sh} "$COMPARE"/{guest-init,hotplug-*} "$REPO"/deploy/guest-module/*) | sha256sum | cut -c1-16)
  IMAGES=$CACHE/images-$RELEASE-$key
  [ -e "$IMAGES/complete" ] && touch "$IMAGES" && return
  say "building the dom0 and guest images in $IMAGES"
  # Those of other days; a checkout beside this one may be using its own.
  find "$CACHE" -maxdepth 1 -name 'images-*' -mtime +3 -exec rm -rf {} +
  mkdir -p "$IMAGES"
  if [ "$RELEASE" = arm64 ]; then
    fetch_arm64_fio
    build_arm64_images
    touch "$IMAGES/complete"
    return
  fi
  zcat "$PACKAGES_ROOT/boot/xen-$XEN_VERSION-amd64.gz" >"$IMAGES/xen" || die "cannot write to $IMAGES (is the disk full?)"
  cp "$PACKAGES_ROOT"/boot/vmlinuz-"$LINUX_VERSION"* "$IMAGES/vmlinuz"
  build_guest_module
  build_guest_image "$IMAGES/guest.cpio"
  build_xenbus_image "$IMAGES/xenbus.cpio" "$IMAGES/guest.cpio"
  build_compare_image "$IMAGES/compare.cpio"
  build_dom0_image "$IMAGES/dom0.cpio" "$IMAGES/guest.cpio"
  touch "$IMAGES/complete"
}
