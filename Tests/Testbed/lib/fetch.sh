# Downloads Debian's Xen, kernel and tools into the cache, and unpacks them there. Nothing is installed on this machine.
# The folder's name is a digest of the package versions, so a new security update gets a folder of its own.

# xen-utils-common is only a wrapper around xen-utils-4.17 and is left out.
TESTBED_PACKAGES="xen-hypervisor-4.17-amd64 xen-utils-4.17 xenstore-utils libxenmisc4.17 libxenhypfs1 libxenstore4
  libxentoolcore1 libxentoollog1 libxencall1 libxendevicemodel1 libxenevtchn1 libxenforeignmemory1 libxengnttab1
  qemu-system-common qemu-utils busybox-static qemu-system-xen qemu-system-data seabios e2fsprogs syslinux mtools
  iperf3 libiperf0 libsctp1 libssl3 qemu-guest-agent libglib2.0-0 libpcre2-8-0 libnuma1 liburing2"

fetch_packages() { # sets PACKAGES_ROOT
  local kernel version uris key folder
  kernel=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-6\.1/ {print $2; exit}')
  [ -n "$kernel" ] || die "apt knows no linux-image-6.1 package: run 'apt-get update' on Debian 12 (bookworm) first"
  version=${kernel#linux-image-}
  kernel="$kernel linux-headers-$version linux-headers-${version%-amd64}-common linux-kbuild-6.1"
  # shellcheck disable=SC2086
  uris=$(apt-get download --print-uris $TESTBED_PACKAGES $kernel 2>"$CACHE/apt.err") ||
    die "apt cannot find a package of the testbed: $(tail -n 1 "$CACHE/apt.err") (run 'apt-get update')"
  key=$(printf '%s\n' "$uris" | awk '{print $2}' | sort | sha256sum | cut -c1-16)
  folder=$CACHE/packages-$key
  PACKAGES_ROOT=$folder/root
  [ -e "$folder/complete" ] && return
  say "downloading Debian's Xen and kernel packages into $folder (about 85 MB)"
  rm -rf "$folder"
  mkdir -p "$folder/debs" "$PACKAGES_ROOT"
  # shellcheck disable=SC2086
  (cd "$folder/debs" && apt-get download $TESTBED_PACKAGES $kernel >"$folder/apt.log" 2>&1) ||
    die "the download failed (is there a network?): $(grep -m 1 '^E:' "$folder/apt.log")"
  local deb
  for deb in "$folder"/debs/*.deb; do
    dpkg -x "$deb" "$PACKAGES_ROOT" || die "cannot unpack $deb (is the disk full?)"
  done
  rm -rf "$folder/debs"
  # The headers find their common part by its place in the system.
  sed -i "s,/usr/src,$PACKAGES_ROOT/usr/src," "$PACKAGES_ROOT"/usr/src/linux-headers-*-amd64/Makefile
  touch "$folder/complete"
}

# fio for the guest, built from Debian's source: the package brings 70 MB of libraries for clusters that no guest here has.
fetch_fio() { # sets FIO
  local folder=$CACHE/fio-3.33-1 apt list
  FIO=$folder/fio
  [ -x "$FIO" ] && return
  need_command gcc gcc
  need_command make make
  say "building fio for the guest from Debian's source package"
  rm -rf "$folder"
  mkdir -p "$folder/apt/parts" "$folder/apt/lists/partial"
  for list in /etc/apt/sources.list.d/*.sources; do
    [ -e "$list" ] && sed 's/^Types:.*/Types: deb-src/' "$list" >"$folder/apt/parts/$(basename "$list")"
  done
  sed -n 's/^deb /deb-src /p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list >"$folder/apt/sources.list" 2>/dev/null
  # A state of apt's own: the machine's sources stay as they are.
  apt="-qq -o Dir::Etc::sourcelist=$folder/apt/sources.list -o Dir::Etc::sourceparts=$folder/apt/parts -o Dir::State::lists=$folder/apt/lists"
  # shellcheck disable=SC2086
  (cd "$folder" && apt-get $apt update && apt-get $apt source --download-only fio) >"$folder/apt.log" 2>&1 ||
    die "the source of fio cannot be downloaded: $(tail -n 2 "$folder/apt.log")"
  (cd "$folder" && mkdir source && tar xf fio_*.orig.tar.[gx]z -C source --strip-components=1) ||
    die "the source of fio cannot be unpacked"
  (cd "$folder/source" && ./configure --build-static --disable-native --disable-http --disable-rdma --disable-rados --disable-rbd \
    --disable-gfapi --disable-numa --disable-pmem --disable-shm && make -j2 fio) >"$folder/build.log" 2>&1 ||
    die "fio cannot be built: $(tail -n 3 "$folder/build.log")"
  strip -o "$FIO" "$folder/source/fio"
  rm -rf "$folder/source" "$folder/apt"
}
