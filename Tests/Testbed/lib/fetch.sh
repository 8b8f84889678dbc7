# Downloads Debian's Xen, kernel and tools into the cache, and unpacks them there. Nothing is installed on this machine.
# The folder's name is a digest of the package versions, so a new security update gets a folder of its own.

# What differs between the releases of Debian that the testbed boots. xen-utils-common is only a wrapper around xen-utils-4.17 and is
# left out of bookworm's list; trixie's comes whole, with all that these packages depend on, since this machine cannot run its programs.
choose_release() { # NAME : sets RELEASE, XEN_VERSION, LINUX_VERSION, RELEASE_PACKAGES
  RELEASE=$1
  RELEASE_PACKAGES="xenstore-utils libxenhypfs1 libxenstore4 libxentoolcore1 libxentoollog1 libxencall1 libxendevicemodel1 libxenevtchn1
    libxenforeignmemory1 libxengnttab1 qemu-system-common qemu-utils busybox-static qemu-system-xen qemu-system-data seabios e2fsprogs
    syslinux mtools iperf3 libiperf0 libsctp1 qemu-guest-agent"
  case $RELEASE in
    bookworm)
      XEN_VERSION=4.17
      LINUX_VERSION=6.1
      RELEASE_PACKAGES+=" libssl3 libglib2.0-0 libpcre2-8-0 libnuma1 liburing2"
      ;;
    trixie)
      XEN_VERSION=4.20
      LINUX_VERSION=6.12
      RELEASE_PACKAGES+=" util-linux zstd dash coreutils sed grep mawk findutils diffutils make gcc libaio1t64 libjson-c5 libsystemd0 libstdc++6 openvswitch-switch"
      ;;
    arm64)
      fetch_arm64_xen
      LINUX_VERSION=6.12
      RELEASE_PACKAGES="xen-utils-4.20 xenstore-utils busybox-static e2fsprogs util-linux iperf3 qemu-guest-agent libgcc-s1 libaio1t64 libjson-c5
        libsystemd0 libstdc++6 qemu-utils qemu-system-common"
      return
      ;;
    *) die "the testbed knows no Debian release '$RELEASE': bookworm, trixie, and arm64" ;;
  esac
  RELEASE_PACKAGES+=" xen-hypervisor-$XEN_VERSION-amd64 xen-utils-$XEN_VERSION libxenmisc$XEN_VERSION"
}

fetch_packages() { # sets PACKAGES_ROOT
  "packages_of_$RELEASE"
  local folder key
  key=$(awk '{print $2}' "$CACHE/uris" | sort | sha256sum | cut -c1-16)
  folder=$CACHE/packages-$RELEASE-$key
  PACKAGES_ROOT=$folder/root
  [ -e "$folder/complete" ] && return
  say "downloading Debian's Xen and kernel packages into $folder ($(awk '{bytes += $3} END {print int(bytes / 1e6)}' "$CACHE/uris") MB)"
  # What the lists of packages of other days left.
  rm -rf "$CACHE/packages-$RELEASE"-*
  mkdir -p "$folder/debs/partial" "$PACKAGES_ROOT"
  "download_$RELEASE" "$folder" || die "the download failed (is there a network?): $(grep -m 1 '^E:' "$folder/apt.log")"
  local deb
  for deb in "$folder"/debs/*.deb; do
    dpkg -x "$deb" "$PACKAGES_ROOT" || die "cannot unpack $deb (is the disk full?)"
  done
  rm -rf "$folder/debs"
  "finish_$RELEASE"
  touch "$folder/complete"
}

kernel_packages() { # APT-CACHE... : of the release's present kernel
  local kernel version
  kernel=$("$@" depends linux-image-amd64 2>/dev/null | awk "/Depends: linux-image-$LINUX_VERSION/ {print \$2; exit}")
  [ -n "$kernel" ] || die "apt knows no linux-image-$LINUX_VERSION package: run 'apt-get update' on Debian 12 (bookworm) first"
  version=${kernel#linux-image-}
  echo "$kernel linux-headers-$version linux-headers-${version%-amd64}-common"
}

# Bookworm: with this machine's apt. Its libraries are used where a program needs one that is not in the list.
packages_of_bookworm() {
  local kernel
  kernel=$(kernel_packages apt-cache) || exit 1
  RELEASE_PACKAGES+=" $kernel linux-kbuild-6.1"
  # shellcheck disable=SC2086
  apt-get download --print-uris $RELEASE_PACKAGES >"$CACHE/uris" 2>"$CACHE/apt.err" ||
    die "apt cannot find a package of the testbed: $(tail -n 1 "$CACHE/apt.err") (run 'apt-get update')"
}
download_bookworm() { # FOLDER
  # shellcheck disable=SC2086
  (cd "$1/debs" && apt-get download $RELEASE_PACKAGES >"$1/apt.log" 2>&1)
}
finish_bookworm() {
  # The headers find their common part by its place in the system.
  sed -i "s,/usr/src,$PACKAGES_ROOT/usr/src," "$PACKAGES_ROOT"/usr/src/linux-headers-*-amd64/Makefile
}

# Trixie: with an apt of its own, for a system where nothing is installed yet.
packages_of_trixie() {
  local kernel
  own_apt "$CACHE/apt-trixie" trixie deb
  # shellcheck disable=SC2086
  kernel=$(kernel_packages apt-cache $APT) || exit 1
  RELEASE_PACKAGES+=" $kernel"
  # shellcheck disable=SC2086
  apt-get $APT --print-uris install $RELEASE_PACKAGES >"$CACHE/uris" 2>"$CACHE/apt.err" ||
    die "apt cannot find a package of the testbed: $(tail -n 1 "$CACHE/apt.err")"
}
download_trixie() { # FOLDER
  local name
  # As base-files has them; the packages' content follows the links.
  mkdir -p "$PACKAGES_ROOT"/usr/{bin,sbin,lib,lib64}
  for name in bin sbin lib lib64; do ln -s "usr/$name" "$PACKAGES_ROOT/$name"; done
  # shellcheck disable=SC2086
  apt-get $APT -o Dir::Cache::archives="$1/debs" --download-only -y install $RELEASE_PACKAGES >"$1/apt.log" 2>&1
}
finish_trixie() {
  # What the packages' scripts would have made, as far as building a module in there needs it.
  mkdir -p "$PACKAGES_ROOT"/{proc,dev,tmp}
  [ -e "$PACKAGES_ROOT/bin/sh" ] || ln -s dash "$PACKAGES_ROOT/bin/sh"
  [ -e "$PACKAGES_ROOT/bin/awk" ] || ln -s mawk "$PACKAGES_ROOT/bin/awk"
  [ -e "$PACKAGES_ROOT/dev/null" ] || mknod -m 666 "$PACKAGES_ROOT/dev/null" c 1 3 || die "cannot make /dev/null in $PACKAGES_ROOT: be root"
  # vxd is built on bookworm, where the library has its name of before the change to 64-bit times. On amd64 it is the same library.
  ln -s libaio.so.1t64 "$PACKAGES_ROOT/usr/lib/x86_64-linux-gnu/libaio.so.1"
}

# fio for the guest, built from Debian's source: the package brings 70 MB of libraries for clusters that no guest here has.
fetch_fio() { # sets FIO
  local folder=$CACHE/fio-3.33-1
  FIO=$folder/fio
  [ -x "$FIO" ] && return
  need_command gcc gcc
  need_command make make
  say "building fio for the guest from Debian's source package"
  rm -rf "$folder"
  mkdir -p "$folder"
  own_apt "$folder/apt" bookworm deb-src
  # shellcheck disable=SC2086
  (cd "$folder" && apt-get $APT source --download-only fio) >"$folder/apt.log" 2>&1 ||
    die "the source of fio cannot be downloaded: $(tail -n 2 "$folder/apt.log")"
  (cd "$folder" && mkdir source && tar xf fio_*.orig.tar.[gx]z -C source --strip-components=1) ||
    die "the source of fio cannot be unpacked"
  (cd "$folder/source" && ./configure --build-static --disable-native --disable-http --disable-rdma --disable-rados --disable-rbd \
    --disable-gfapi --disable-numa --disable-pmem --disable-shm && make -j2 fio) >"$folder/build.log" 2>&1 ||
    die "fio cannot be built: $(tail -n 3 "$folder/build.log")"
  strip -o "$FIO" "$folder/source/fio"
  rm -rf "$folder/source" "$folder/apt"
}
