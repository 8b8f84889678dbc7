# A whole Debian 12, with systemd as its init, for scenarios that say "# needs: debian": dom0 is installed as an operator installs it, on a
# disk, and vxd comes as its packages. The disk is made once and cached; a machine sees a snapshot of it, which is gone at its end.

# Debian without anything that is not needed, as an archive. Tests/check-packages starts from it too.
debian_base() { # ARCHIVE [RELEASE] : unless it is there
  local root mirror release=${2:-bookworm}
  [ ! -e "$1" ] || return 0
  need_command debootstrap debootstrap
  mkdir -p "$(dirname "$1")"
  mirror=$(archive main)
  [ -n "$mirror" ] || die "apt knows no Debian archive: run 'apt-get update' on Debian 12 (bookworm) first"
  say "making a Debian to start from (once)"
  # Not in /tmp, which may be mounted without devices or programs.
  root=$(mktemp -d -p "$(dirname "$1")")
  debootstrap --variant=minbase "$release" "$root" "$mirror" >"${1%.tar}.log" 2>&1 ||
    { drop_tree "$root"; die "debootstrap: $(tail -n 3 "${1%.tar}.log")"; }
  tar -C "$root" -cf "$1.$$" . && mv "$1.$$" "$1" || { drop_tree "$root"; die "cannot write $1 (is the disk full?)"; }
  drop_tree "$root"
}

drop_tree() { # ROOT : with what is mounted in it
  umount -l "$1/proc" 2>/dev/null
  rm -rf --one-file-system "$1"
}

# How this machine reaches its archives is how the tree does. Security updates too: Debian's Xen libraries come from there.
use_apt_of_this_machine() { # ROOT
  local security release
  release=$(. "$1/etc/os-release" && echo "$VERSION_CODENAME")
  cp /etc/resolv.conf "$1/etc/resolv.conf"
  # Settings, not hooks: those call programs that are not in there.
  apt-config dump | grep '^Acquire::' >"$1/etc/apt/apt.conf.d/99host"
  security=$(archive security)
  [ -z "$security" ] || grep -q security "$1/etc/apt/sources.list" ||
    echo "deb $security $release-security main" >>"$1/etc/apt/sources.list"
}

DEBIAN_PACKAGES="systemd-sysv udev dbus kmod procps iproute2 bridge-utils iputils-ping xen-utils-4.17 xen-utils-common xenstore-utils qemu-system-xen
  libaio1 libjson-c5 libsystemd0 libxencall1 libxendevicemodel1 libxenevtchn1 libxenforeignmemory1 libxengnttab1 libxenstore4"

check_debs() { ls "$DEBS"/vxd_*.deb >/dev/null 2>&1 || die "scenarios in a Debian with systemd want packages, and there are none in $DEBS: run 'make deb' first"; }

# A tree of Debian 12 with packages, for a disk that is made of it; services do not start as they are installed in there. Sets root, below the folder and
# not in /tmp, which may be mounted without devices or programs. /proc is mounted in it, and what apt needed is there, until end_tree.
begin_tree() { # FOLDER PACKAGES
  debian_base "$CACHE/chroot-bookworm.tar"
  mkdir -p "$1"
  root=$(mktemp -d -p "$1")
  tar -C "$root" -xf "$CACHE/chroot-bookworm.tar" && use_apt_of_this_machine "$root" && mount -t proc proc "$root/proc" &&
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" && chmod 755 "$root/usr/sbin/policy-rc.d" ||
    { drop_tree "$root"; die "cannot make a tree of Debian in $1 (are you root, is the disk full?)"; }
  in_tree "$1" "apt-get -q update && apt-get -y -q --no-install-recommends install $(echo $2) && apt-get clean" ||
    { drop_tree "$root"; die "Debian's packages cannot be installed: $(grep -m 1 '^E:' "$1/install.log")"; }
}

in_tree() { # FOLDER COMMAND : in $root; the folder has the log
  DEBIAN_FRONTEND=noninteractive LC_ALL=C timeout 900 chroot "$root" sh -c "$2" >>"$1/install.log" 2>&1 </dev/null
}

end_tree() {
  ! mountpoint -q "$root/proc" || umount "$root/proc"
  rm -rf "$root/usr/sbin/policy-rc.d" "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/locale/* "$root/etc/resolv.conf" "$root/etc/apt/apt.conf.d/99host"
}

# Sets DEBIAN_IMAGE, a disk of one ext4 file system. Its kernel modules are those of the kernel that the testbed boots.
prepare_debian() {
  local key root lock name
  key=$( (echo "$PACKAGES_ROOT $DEBIAN_PACKAGES"; declare -f begin_tree in_tree end_tree prepare_debian; cat "$TESTBED"/debian/run "$TESTBED"/debian/testbed.service) | sha256sum | cut -c1-16)
  DEBIAN_IMAGE=$CACHE/debian-$key/root.img
  [ ! -e "$DEBIAN_IMAGE" ] || { touch "${DEBIAN_IMAGE%/*}"; return 0; }
  exec {lock}>"$CACHE/debian-lock"
  flock --timeout 1800 "$lock" || die "another testbed has been making the Debian disk for half an hour"
  [ -e "$DEBIAN_IMAGE" ] || {
    find "$CACHE" -maxdepth 1 -name 'debian-*' -type d -mtime +3 -exec rm -rf {} +
    say "making the disk of a Debian with systemd and Xen's toolstack (once)"
    begin_tree "${DEBIAN_IMAGE%/*}" "$DEBIAN_PACKAGES"
    end_tree
    for name in "$PACKAGES_ROOT"/lib/modules/*; do
      mkdir -p "$root/lib/modules/${name##*/}/kernel/drivers/net"
      cp "$name"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/${name##*/}/"
      cp -r "$name"/kernel/{fs,lib,crypto,net} "$root/lib/modules/${name##*/}/kernel/"
      cp -r "$name"/kernel/drivers/{xen,block,virtio,char} "$root/lib/modules/${name##*/}/kernel/drivers/"
      cp "$name"/kernel/drivers/net/{tun,tap,macvlan,macvtap,veth,dummy}.ko "$root/lib/modules/${name##*/}/kernel/drivers/net/"
      depmod -b "$root" "${name##*/}" || { drop_tree "$root"; die "depmod is missing; install it with: apt-get install kmod"; }
    done
    # What scenarios are written with, beside Debian's own programs.
    install -m 755 "$PACKAGES_ROOT/bin/busybox" "$root/usr/local/bin/busybox"
    ln -s busybox "$root/usr/local/bin/usleep"
    install -m 755 "$TESTBED/debian/run" "$root/usr/local/sbin/testbed-run"
    install -m 644 "$TESTBED/debian/testbed.service" "$root/etc/systemd/system/testbed.service"
    ln -sf /etc/systemd/system/testbed.service "$root/etc/systemd/system/multi-user.target.wants/testbed.service"
    # Nobody asks for passwords on the console that the scenario speaks on, and nothing happens by the day's time.
    ln -sf /dev/null "$root/etc/systemd/system/serial-getty@hvc0.service"
    ln -sf /dev/null "$root/etc/systemd/system/getty.target"
    ln -sf /dev/null "$root/etc/systemd/system/apt-daily.timer"
    ln -sf /dev/null "$root/etc/systemd/system/apt-daily-upgrade.timer"
    mkdir -p "$root/disks" "$root/guest"
    printf 'XENCONSOLED_ARGS="--log=all --log-dir=/var/log/xen"\n' >>"$root/etc/default/xen"
    printf 'tmpfs /disks tmpfs size=300m 0 0\n' >"$root/etc/fstab"
    echo testbed >"$root/etc/hostname"
    mkfs.ext4 -q -q -F -d "$root" "$DEBIAN_IMAGE.part" 1400M && mv "$DEBIAN_IMAGE.part" "$DEBIAN_IMAGE" || die "cannot write $DEBIAN_IMAGE (is the disk full?)"
    drop_tree "$root"
  }
  exec {lock}>&-
}

needs_debian() { [ -n "$1" ] && grep -q '^# needs: .*debian' "$1"; }

# For the initial RAM disk: what finds the disk, and the packages of vxd, with one more of a later version. guest/debian.cpio is the same for a
# driver domain, with what it is told by.
add_debian() { # FOLDER
  local next
  mkdir -p "$1/packages" "$1/guest"
  cp "$DEBS"/vxd_*.deb "$1/packages/"
  next=$(mktemp -d)
  dpkg-deb -R "$DEBS"/vxd_*.deb "$next/tree" && sed -i 's/^Version: .*/&+next/' "$next/tree/DEBIAN/control" &&
    dpkg-deb --root-owner-group -Znone -b "$next/tree" "$1/packages/next.deb" >/dev/null || die "the package of a later version cannot be made"
  rm -rf "$next/tree"
  debian_initrd "$1"
  base_image "$next"
  debian_initrd "$next"
  # busybox's switch_root wants one of this name.
  mv "$next/debian-init" "$next/init"
  cp "$TESTBED/driver/driver-lib.sh" "$next/"
  cp -r "$1/packages" "$next/"
  pack "$next" "$1/guest/debian.cpio"
  rm -rf "$next"
}

debian_initrd() { # FOLDER
  install -m 755 "$TESTBED/debian/init" "$1/debian-init"
  copy_modules "$1" crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft t10-pi scsi_common scsi_mod libata libahci ahci sd_mod \
    crc16 mbcache jbd2 crc32c_generic libcrc32c ext4 xen-blkfront
}
