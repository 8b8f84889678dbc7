# The machine of NAME@arm64: Xen for Arm in qemu-system-aarch64, with Debian trixie's kernel and programs for arm64.
#
# Debian's Xen for Arm has no ioreq servers, so the hypervisor is built from Debian's source package with CONFIG_IOREQ_SERVER: trixie's, or,
# where an archive does not have its files, bookworm's, whose toolstack comes with it. The machine says which (XEN_VERSION).
#
# The emulator has one processor, in real time: with more, Xen and QEMU 7.2 stall.

ARM64_TOOLS="qemu-system-aarch64:qemu-system-arm aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu bison:bison flex:flex readelf:binutils"

check_arm64_tools() {
  local tool
  for tool in $ARM64_TOOLS; do need_command "${tool%%:*}" "${tool#*:}"; done
}

# Sets ARM64_XEN, the hypervisor, and XEN_VERSION: the newest whose source can be downloaded, looked for once a day.
fetch_arm64_xen() {
  local release version folder chosen=$CACHE/xen-arm64
  check_arm64_tools
  if [ -z "$(find "$chosen" -mtime -1 2>/dev/null)" ]; then
    : >"$chosen.log"
    for release in trixie bookworm; do
      own_apt "$CACHE/apt-source-$release" "$release" deb-src
      # shellcheck disable=SC2086
      for version in $(apt-cache $APT showsrc xen 2>/dev/null | awk '/^Version:/ {print $2}' | sort -urV); do
        build_arm64_xen "$version" && echo "$version" >"$chosen" && break 2
      done
    done
    [ -e "$chosen" ] || die "no source package of Xen can be downloaded: $(grep -m 1 '^E:' "$chosen.log")"
    touch "$chosen"
  fi
  version=$(cat "$chosen")
  folder=$CACHE/xen-arm64-$version
  [ -e "$folder/xen" ] || { rm -f "$chosen" && fetch_arm64_xen && return; }
  ARM64_XEN=$folder/xen
  XEN_VERSION=${version%%-*}
  XEN_VERSION=$(echo "$XEN_VERSION" | cut -d . -f 1-2)
}

build_arm64_xen() { # VERSION : false when its source cannot be downloaded
  local folder=$CACHE/xen-arm64-$1
  [ -e "$folder/xen" ] && return
  rm -rf "$folder"
  mkdir -p "$folder/source"
  # shellcheck disable=SC2086
  (cd "$folder" && apt-get $APT source --download-only "xen=$1") >>"$CACHE/xen-arm64.log" 2>&1 || { rm -rf "$folder"; return 1; }
  say "building Xen $1 for Arm from Debian's source package"
  tar xf "$folder"/xen_*.orig.tar.xz -C "$folder/source" --strip-components=1 || die "the source of Xen cannot be unpacked"
  (
    cd "$folder/source/xen" || exit 1
    cross=(XEN_TARGET_ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-)
    make "${cross[@]}" arm64_defconfig &&
      printf 'CONFIG_EXPERT=y\nCONFIG_IOREQ_SERVER=y\nCONFIG_XSM_DUMMY_DEFAULT=y\n' >>.config &&
      make "${cross[@]}" olddefconfig && grep -q CONFIG_IOREQ_SERVER=y .config && make "${cross[@]}" -j2
  ) >"$folder/build.log" 2>&1 || die "Xen for Arm cannot be built: $(tail -n 3 "$folder/build.log")"
  cp "$folder/source/xen/xen" "$folder/xen" || die "Xen's build made no hypervisor"
  rm -rf "$folder/source"
}

# Packages: trixie's, and the toolstack of Xen's own release.
packages_of_arm64() {
  local kernel
  own_apt "$CACHE/apt-arm64" trixie deb arm64
  # shellcheck disable=SC2086
  kernel=$(apt-cache $APT depends linux-image-arm64 2>/dev/null | awk "/Depends: linux-image-$LINUX_VERSION/ {print \$2; exit}")
  [ -n "$kernel" ] || die "apt knows no linux-image-$LINUX_VERSION package for arm64"
  RELEASE_PACKAGES+=" $kernel"
  # shellcheck disable=SC2086
  apt-get $APT --print-uris install $RELEASE_PACKAGES >"$CACHE/uris" 2>"$CACHE/apt.err" ||
    die "apt cannot find a package of the testbed: $(tail -n 1 "$CACHE/apt.err")"
  [ "$XEN_VERSION" != 4.20 ] || return 0
  own_apt "$CACHE/apt-arm64-bookworm" bookworm deb arm64
  # shellcheck disable=SC2086
  apt-get $APT --print-uris download $ARM64_OLD_TOOLSTACK >>"$CACHE/uris" 2>"$CACHE/apt.err" ||
    die "apt cannot find a package of the testbed: $(tail -n 1 "$CACHE/apt.err")"
}

# What bookworm's xl is linked to and trixie has in another version.
ARM64_OLD_TOOLSTACK="xen-utils-4.17 libxenmisc4.17 libfdt1"

download_arm64() { # FOLDER
  local name
  mkdir -p "$PACKAGES_ROOT"/usr/{bin,sbin,lib}
  for name in bin sbin lib; do ln -s "usr/$name" "$PACKAGES_ROOT/$name"; done
  own_apt "$CACHE/apt-arm64" trixie deb arm64
  # shellcheck disable=SC2086
  apt-get $APT -o Dir::Cache::archives="$1/debs" --download-only -y install $RELEASE_PACKAGES >"$1/apt.log" 2>&1 || return 1
  [ "$XEN_VERSION" != 4.20 ] || return 0
  own_apt "$CACHE/apt-arm64-bookworm" bookworm deb arm64
  # shellcheck disable=SC2086
  (cd "$1/debs" && rm -f libfdt1_* && apt-get $APT download $ARM64_OLD_TOOLSTACK) >>"$1/apt.log" 2>&1
}
finish_arm64() { :; }

# What PROGRAM is linked to, in lines of ldd's. No loader here runs programs for Arm: their headers are read.
list_arm64_libraries() { # PROGRAM
  local waiting=("$1") seen=" " program name file
  while [ ${#waiting[@]} -gt 0 ]; do
    program=${waiting[0]}
    waiting=("${waiting[@]:1}")
    for name in $(readelf -d "$program" 2>/dev/null | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p'); do
      case $seen in *" $name "*) continue ;; esac
      seen+="$name "
      case $name in ld-linux-*) continue ;; esac
      file=$(find -L "$PACKAGES_ROOT/usr/lib/aarch64-linux-gnu" "$PACKAGES_ROOT/usr/lib/xen-$XEN_VERSION" -maxdepth 2 -name "$name" 2>/dev/null | head -n 1)
      if [ -n "$file" ]; then
        echo "$name => $file"
        waiting+=("$file")
      else
        echo "$name => not found"
      fi
    done
  done
}

# fio for the guest, with the C library of the SDK that vxd is built with.
fetch_arm64_fio() { # sets FIO
  local folder=$CACHE/fio-arm64-3.33-1 sysroot
  FIO=$folder/fio
  [ -x "$FIO" ] && return
  sysroot=$(find "$CACHE" -maxdepth 2 -path '*/arm64-sdk-*/sysroot' | head -n 1)
  [ -n "$sysroot" ] || die "there is no Swift SDK for arm64: run 'make arm64' first"
  say "building fio for guests on Arm"
  rm -rf "$folder"
  mkdir -p "$folder/source"
  tar xf "$CACHE"/fio-3.33-1/fio_*.orig.tar.[gx]z -C "$folder/source" --strip-components=1 || die "the source of fio cannot be unpacked"
  (cd "$folder/source" && ./configure --cc="aarch64-linux-gnu-gcc --sysroot=$sysroot -B$sysroot/usr/lib/aarch64-linux-gnu" --build-static \
    --cpu=aarch64 --disable-native --disable-http --disable-rdma --disable-rados --disable-rbd --disable-gfapi --disable-numa \
    --disable-pmem --disable-shm --disable-lex && sed -i '/CONFIG_ZLIB/d' config-host.mak config-host.h && make -j2 fio) >"$folder/build.log" 2>&1 ||
    die "fio cannot be built for arm64: $(tail -n 3 "$folder/build.log")"
  aarch64-linux-gnu-strip -o "$FIO" "$folder/source/fio"
  rm -rf "$folder/source"
}

# Headers of the guests' kernel, to build modules with the compiler of this machine's release. What a build runs of them is amd64's of the same
# version, with the C library that it wants. Sets ARM64_HEADERS.
fetch_arm64_headers() {
  local version common folder deb name
  version=$(find "$PACKAGES_ROOT/boot" -name "vmlinuz-$LINUX_VERSION*" -printf '%f' | sed 's/^vmlinuz-//')
  common=${version%-arm64}
  folder=$CACHE/headers-arm64-$version
  ARM64_HEADERS=$folder/usr/src/linux-headers-$version
  [ -e "$folder/complete" ] && return
  say "downloading the headers of Linux $version"
  rm -rf "$CACHE"/headers-arm64-*
  mkdir -p "$folder/debs" "$folder"/usr/lib64
  ln -s usr/lib64 "$folder/lib64"
  own_apt "$CACHE/apt-arm64" trixie deb arm64
  # shellcheck disable=SC2086
  (cd "$folder/debs" && apt-get $APT download "linux-headers-$version" "linux-headers-$common-common") >"$folder/apt.log" 2>&1 ||
    die "the headers of Linux $version cannot be downloaded: $(grep -m 1 '^E:' "$folder/apt.log")"
  own_apt "$CACHE/apt-trixie" trixie deb
  # shellcheck disable=SC2086
  (cd "$folder/debs" && apt-get $APT download "linux-kbuild-$common" libc6) >"$folder/apt.log" 2>&1 ||
    die "what builds modules of Linux $version cannot be downloaded: $(grep -m 1 '^E:' "$folder/apt.log")"
  for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder" || die "cannot unpack $deb (is the disk full?)"; done
  rm -rf "$folder/debs"
  # The headers find their common part by its place in the system.
  sed -i "s,/usr/src,$folder/usr/src," "$ARM64_HEADERS/Makefile"
  # The kernel's compiler, GCC 14, can align every function; older ones leave out those that are marked cold, for which the kernel has another way.
  sed -i '/CONFIG_CC_HAS_\(MIN\|SANE\)_FUNCTION_ALIGNMENT/d' "$ARM64_HEADERS"/include/config/auto.conf "$ARM64_HEADERS"/include/generated/autoconf.h
  name=$folder/usr/lib/linux-kbuild-$common/scripts/mod/modpost
  printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' "$folder/usr/lib64/ld-linux-x86-64.so.2" "$folder/usr/lib/x86_64-linux-gnu" "$name.real-lsb-64" >"$name"
  touch "$folder/complete"
}

# As build_guest_module. Sets MODULE.
build_arm64_module() {
  local folder
  fetch_arm64_headers
  folder=$(mktemp -d)
  cp "$REPO"/deploy/guest-module/* "$folder/"
  # Without the description of its types, which would want pahole.
  make -C "$ARM64_HEADERS" CC=aarch64-linux-gnu-gcc CONFIG_DEBUG_INFO_BTF_MODULES= M="$folder" modules >"$IMAGES/module.log" 2>&1 ||
    die "the guest module does not build for arm64: $(grep -m 3 -i error "$IMAGES/module.log")"
  ! grep -i -A 3 'warning:' "$IMAGES/module.log" || die "the guest module builds with warnings for arm64"
  MODULE=$IMAGES/virtio_xenbus.ko
  aarch64-linux-gnu-strip --strip-debug -o "$MODULE" "$folder/virtio_xenbus.ko"
  rm -rf "$folder"
}

build_arm64_images() {
  local image tool
  build_arm64_module
  cp "$ARM64_XEN" "$IMAGES/xen"
  cp "$PACKAGES_ROOT"/boot/vmlinuz-"$LINUX_VERSION"* "$IMAGES/vmlinuz"
  image=$(mktemp -d)
  base_image "$image"
  copy_with_libraries "$image" "$PACKAGES_ROOT/sbin/mke2fs" /sbin/mkfs.ext4
  install -m 755 "$FIO" "$image/bin/fio"
  copy_modules "$image" virtio_ring virtio virtio_mmio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk crc16 mbcache jbd2 \
    crc32c_generic libcrc32c ext4 failover net_failover virtio_net virtio_console virtio-rng garp mrp llc stp 8021q
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/iperf3" /bin/iperf3
  copy_with_libraries "$image" "$PACKAGES_ROOT/usr/sbin/qemu-ga" /bin/qemu-ga
  cp "$MODULE" "$image/modules/"
  cp "$TESTBED"/guest/* "$image/"
  mv "$image/mke2fs.conf" "$image/etc/"
  chmod 755 "$image/init"
  pack "$image" "$IMAGES/guest.cpio"
  rm -rf "$image"
  image=$(mktemp -d)
  base_image "$image"
  for tool in xl xenstored xenconsoled xenconsole xen-init-dom0 libxl-save-helper; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/lib/xen-$XEN_VERSION/bin/$tool" "/usr/lib/xen-$XEN_VERSION/bin/$tool"
  done
  for tool in xenstore-ls xenstore-read xenstore-write xenstore-rm xenstore-list xenstore-exists xenstore-watch setpriv iperf3 qemu-storage-daemon qemu-img; do
    copy_with_libraries "$image" "$PACKAGES_ROOT/usr/bin/$tool" "/bin/$tool"
  done
  ln -s "../lib/xen-$XEN_VERSION/bin/xl" "$image/sbin/xl"
  copy_modules "$image" xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs loop tun llc stp bridge garp mrp 8021q veth macvlan tap macvtap
  mkdir -p "$image/guest"
  cp "$IMAGES/vmlinuz" "$image/guest/Image"
  gzip -1 -n -c "$IMAGES/guest.cpio" >"$image/guest/guest.cpio.gz"
  install -m 755 "$TESTBED/dom0/init" "$image/init"
  pack "$image" "$IMAGES/dom0.cpio"
  rm -rf "$image"
  # For scenarios that say "# needs: xenbus". What guests boot from is dom0's in any case.
  image=$(mktemp -d)
  mkdir "$image/guest"
  build_driver_image "$image/guest/driver.cpio"
  pack "$image" "$IMAGES/xenbus.cpio"
  rm -rf "$image"
}

# As `boot`.
boot_arm64() { # INITRD FOLDER [COMMAND...]
  local initrd=$1 folder=$2
  shift 2
  cd "$folder" || exit 1
  exec "$@" qemu-system-aarch64 -machine virt,virtualization=on,gic-version=3 -cpu cortex-a57 -accel tcg,thread=multi -smp 1 -m "$MACHINE_MEMORY" \
    -monitor unix:monitor,server=on,wait=off -serial stdio -no-reboot -nodefaults -display none -nic none \
    -kernel "$IMAGES/xen" -append "console=dtuart dom0_mem=1400M dom0_max_vcpus=1 loglvl=warning guest_loglvl=warning bootscrub=0" \
    -device "guest-loader,addr=0x50000000,kernel=$IMAGES/vmlinuz,bootargs=console=hvc0 rdinit=/init quiet" \
    -device "guest-loader,addr=0x58000000,initrd=$initrd"
}
