# Builds the images that the testbed boots: dom0's and the guest's, both a cpio archive that Linux unpacks into memory.
# They are cached by the content that they are made from.

copy_with_libraries() { # IMAGE PROGRAM DESTINATION : a program and what it is linked to
  local image=$1 program=$2 destination=$3 library
  install -D -m 755 "$program" "$image$destination"
  LD_LIBRARY_PATH="$PACKAGES_ROOT/usr/lib/x86_64-linux-gnu:$PACKAGES_ROOT/lib/x86_64-linux-gnu" ldd "$program" 2>/dev/null |
    awk '/not found/ {print "missing:" $1} $2 == "=>" && $3 ~ /^\// {print $3} $1 ~ /^\// {print $1}' |
    while read -r library; do
      case $library in
        missing:*) die "$program needs ${library#missing:}, which neither this machine nor the cache has" ;;
        /lib64/*) install -D -m 755 "$library" "$image$library" ;;
        *) [ -e "$image/lib/$(basename "$library")" ] || install -D -m 755 "$library" "$image/lib/$(basename "$library")" ;;
      esac
    done || exit 1
}

copy_modules() { # IMAGE NAME... : kernel modules into /modules, without their folders
  local image=$1 name file
  shift
  mkdir -p "$image/modules"
  for name in "$@"; do
    file=$(find "$PACKAGES_ROOT/lib/modules" -name "$name.ko" | head -n 1)
    [ -n "$file" ] || die "the kernel package has no module $name"
    cp "$file" "$image/modules/"
  done
}

base_image() { # IMAGE : folders and busybox
  mkdir -p "$1"/{bin,sbin,lib,etc,proc,sys,dev,run,tmp,var/log,var/lib,root,lib64,usr}
  # mktemp keeps others out of the root, and so out of everything.
  chmod 755 "$1"
  install -m 755 "$PACKAGES_ROOT/bin/busybox" "$1/bin/busybox"
  ln -s busybox "$1/bin/sh"
  ln -s ../lib "$1/usr/lib"
}

pack() { # FOLDER ARCHIVE
  (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --null --quiet -o -H newc -R 0:0 | gzip -1) >"$2.part" || die "cannot write $2"
  mv "$2.part" "$2"
}

# The guest module, built against the headers of the kernel that the guests boot. Sets MODULE.
build_guest_module() {
  local folder
  need_command gcc gcc
  need_command make make
  folder=$(mktemp -d)
  cp "$REPO"/deploy/guest-module/* "$folder/"
  make -C "$PACKAGES_ROOT"/usr/src/linux-headers-6.1*-amd64 M="$folder" W=1 modules >"$IMAGES/module.log" 2>&1 ||
    die "the guest module does not build: $(grep -m 3 -i error "$IMAGES/module.log")"
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
  copy_modules "$image" virtio_ring virtio virtio_mmio virtio_blk crc16 mbcache jbd2 crc32c_generic libcrc32c ext4 \
    failover net_failover virtio_net virtio_console virtio-rng garp mrp llc stp 8021q
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/sbin/qemu-ga" /bin/qemu-ga
  cp "$MODULE" "$image/modules/"
  cp "$TESTBED"/guest/* "$image/"
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
  ln -s "$PACKAGES_ROOT/usr/bin/mtools" "$folder/mcopy"
  ln -s "$PACKAGES_ROOT/usr/bin/mtools" "$folder/mattrib"
  ln -s "$PACKAGES_ROOT/usr/bin/mtools" "$folder/mformat"
  ln -s "$PACKAGES_ROOT/usr/bin/mtools" "$folder/mmove"
  {
    printf 'default guest\nprompt 0\nlabel guest\n kernel vmlinuz\n initrd initrd.gz\n append '
    printf '#%.0s' $(seq 480)
    printf '\n'
  } >"$folder/syslinux.cfg"
  truncate -s 32M "$1"
  (
    export PATH="$folder:$PATH"
    mformat -i "$1" -T 65536 -h 16 -s 63 :: && mcopy -i "$1" "$IMAGES/vmlinuz" ::vmlinuz &&
      mcopy -i "$1" "$2" ::initrd.gz && mcopy -i "$1" "$folder/syslinux.cfg" ::syslinux.cfg &&
      "$PACKAGES_ROOT/usr/bin/syslinux" --install "$1"
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
  copy_modules "$image" xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop
  cp "$TESTBED"/driver/* "$image/"
  chmod 755 "$image/init"
  pack "$image" "$1"
  rm -rf "$image"
}

# What PV and PVH guests boot from, for scenarios that say "# needs: xenbus": the kernel unpacked, which xl would need seconds for.
build_xenbus_image() { # ARCHIVE GUEST_ARCHIVE
  local image offset
  image=$(mktemp -d)
  mkdir "$image/guest"
  offset=$(LC_ALL=C grep -abo -P '\xFD7zXZ\x00' "$IMAGES/vmlinuz" | head -n 1 | cut -d: -f1)
  tail -c "+$((offset + 1))" "$IMAGES/vmlinuz" | xz -dc >"$image/guest/vmlinux" 2>/dev/null
  [ "$(head -c 4 "$image/guest/vmlinux" | tail -c 3)" = ELF ] || die "the kernel cannot be unpacked"
  cp "$2" "$image/guest/guest.cpio.gz"
  build_driver_image "$image/guest/driver.cpio.gz"
  pack "$image" "$1"
  rm -rf "$image"
}

build_dom0_image() { # ARCHIVE GUEST_ARCHIVE
  local image tool
  image=$(mktemp -d)
  base_image "$image"
  for tool in xl xenstored xenconsoled xenconsole xen-init-dom0 libxl-save-helper lsevtchn; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/lib/xen-4.17/bin/$tool" "/usr/lib/xen-4.17/bin/$tool"
  done
  for tool in xenstore-ls xenstore-read xenstore-write xenstore-rm xenstore-list xenstore-exists xenstore-watch; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"
  done
  ln -s ../lib/xen-4.17/bin/xl "$image/sbin/xl"
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/libexec/xen-qemu-system-i386" /usr/libexec/xen-qemu-system-i386
  # util-linux is on every Debian system.
  copy_with_libraries "$image" /usr/bin/setpriv /bin/setpriv
  for tool in qemu-storage-daemon qemu-img; do copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"; done
  install -D "$PACKAGES_ROOT/usr/lib/xen-4.17/boot/hvmloader" "$image/usr/lib/xen-4.17/boot/hvmloader"
  install -D "$PACKAGES_ROOT/usr/share/seabios/bios-256k.bin" "$image/usr/share/seabios/bios-256k.bin"
  mkdir -p "$image/usr/share/qemu/keymaps"
  cp "$PACKAGES_ROOT/usr/share/qemu/kvmvapic.bin" "$image/usr/share/qemu/"
  cp "$PACKAGES_ROOT"/usr/share/qemu/keymaps/en-us "$image/usr/share/qemu/keymaps/"
  cp -L "$PACKAGES_ROOT"/usr/share/seabios/vgabios-stdvga.bin "$image/usr/share/seabios/"
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_modules "$image" xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop tun llc stp bridge garp mrp 8021q
  mkdir -p "$image/guest"
  build_boot_image "$image/guest/boot.img" "$2"
  install -m 755 "$TESTBED/dom0/init" "$image/init"
  pack "$image" "$1"
  rm -rf "$image"
}

prepare_images() { # sets IMAGES
  need_command cpio cpio
  mkdir -p "$CACHE" || die "cannot write to the cache folder $CACHE (set VXD_CACHE to another one)"
  fetch_packages
  fetch_fio
  local key
  key=$( (echo "$PACKAGES_ROOT"; cat "$TESTBED"/lib/images.sh "$TESTBED"/dom0/init "$TESTBED"/guest/* "$TESTBED"/driver/* "$REPO"/deploy/guest-module/*) | sha256sum | cut -c1-16)
  IMAGES=$CACHE/images-$key
  [ -e "$IMAGES/complete" ] && return
  say "building the dom0 and guest images in $IMAGES"
  rm -rf "$CACHE"/images-*
  mkdir -p "$IMAGES"
  zcat "$PACKAGES_ROOT"/boot/xen-4.17-amd64.gz >"$IMAGES/xen" || die "cannot write to $IMAGES (is the disk full?)"
  cp "$PACKAGES_ROOT"/boot/vmlinuz-6.1* "$IMAGES/vmlinuz"
  build_guest_module
  build_guest_image "$IMAGES/guest.cpio.gz"
  build_xenbus_image "$IMAGES/xenbus.cpio.gz" "$IMAGES/guest.cpio.gz"
  build_dom0_image "$IMAGES/dom0.cpio.gz" "$IMAGES/guest.cpio.gz"
  touch "$IMAGES/complete"
}
