# The disk of a stock Debian 12 guest, for scenarios that say "# needs: stock": debootstrap's tree with Debian's own kernel, initial RAM disk
# and GRUB, on a disk with a partition table. It is made once and cached; dom0 has a snapshot of it as /dev/sda.

STOCK_PACKAGES="grub-pc linux-image-cloud-amd64 initramfs-tools zstd kmod udev kexec-tools pciutils iproute2 ipxe dnsmasq-base"

needs_stock() { [ -n "$1" ] && grep -q '^# needs: .*stock' "$1"; }

# Sets STOCK, the folder of disk.img and net.cpio. A second kernel in the guest, to execute from the first one, is the one that the testbed boots.
prepare_stock() {
  local key root lock version
  key=$( (echo "$PACKAGES_ROOT $STOCK_PACKAGES"; declare -f begin_tree in_tree end_tree prepare_stock fill_stock write_stock_disk add_net_server; cat "$TESTBED"/stock/*) | sha256sum | cut -c1-16)
  STOCK=$CACHE/stock-$key
  [ ! -e "$STOCK/disk.img" ] || { touch "$STOCK"; return 0; }
  exec {lock}>"$CACHE/debian-lock"
  flock --timeout 1800 "$lock" || die "another testbed has been making a Debian disk for half an hour"
  [ -e "$STOCK/disk.img" ] || {
    find "$CACHE" -maxdepth 1 -name 'stock-*' -type d -mtime +3 -exec rm -rf {} +
    say "making the disk of a stock Debian guest (once)"
    begin_tree "$STOCK" "$STOCK_PACKAGES"
    version=$(basename "$PACKAGES_ROOT"/lib/modules/*)
    fill_stock
    end_tree
    add_net_server
    write_stock_disk
    drop_tree "$root"
  }
  exec {lock}>&-
}

fill_stock() {
  local name line
  # The second kernel is not where GRUB's configuration looks: the first one is to be booted.
  mkdir -p "$root/second" "$root/lib/modules/$version/kernel/drivers/net"
  cp "$IMAGES/vmlinuz" "$root/second/vmlinuz"
  cp "$PACKAGES_ROOT/boot/config-$version" "$root/boot/"
  cp "$PACKAGES_ROOT/lib/modules/$version"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$version/"
  for name in fs/ext4 fs/jbd2 lib crypto drivers/block drivers/virtio drivers/char; do
    mkdir -p "$root/lib/modules/$version/kernel/$name"
    cp -r "$PACKAGES_ROOT/lib/modules/$version/kernel/$name/." "$root/lib/modules/$version/kernel/$name/"
  done
  cp "$PACKAGES_ROOT/lib/modules/$version"/kernel/fs/mbcache.ko* "$root/lib/modules/$version/kernel/fs/"
  cp "$PACKAGES_ROOT/lib/modules/$version"/kernel/drivers/net/{net_failover,virtio_net}.ko* "$root/lib/modules/$version/kernel/drivers/net/"
  mkdir -p "$root/lib/modules/$version/kernel/net/core"
  cp "$PACKAGES_ROOT/lib/modules/$version"/kernel/net/core/failover.ko* "$root/lib/modules/$version/kernel/net/core/"
  in_tree "$STOCK" "depmod $version && mkinitramfs -o /second/initrd.img $version" || { drop_tree "$root"; die "no initial RAM disk: $(tail -n 2 "$STOCK/install.log")"; }
  rm -f "$root/boot/config-$version"
  # What the scenario is written with, beside Debian's own programs.
  install -m 755 "$PACKAGES_ROOT/bin/busybox" "$root/usr/local/bin/busybox"
  install -m 755 "$CACHE/fio-3.33-1/fio" "$root/usr/local/bin/fio"
  install -m 755 "$TESTBED/stock/init" "$root/usr/local/sbin/testbed-init"
  install -m 644 "$TESTBED/stock/grub" "$root/etc/default/grub"
  echo stock >"$root/etc/hostname"
  echo '/dev/vda1 / ext4 defaults 0 1' >"$root/etc/fstab"
  # The first menu: GRUB's own programs look at the disk that they run on, and write theirs from within the guest.
  mkdir -p "$root/boot/grub/i386-pc"
  cp "$root"/usr/lib/grub/i386-pc/*.{mod,lst} "$root/boot/grub/i386-pc/"
  {
    printf 'serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\nset timeout=-1\n'
    line=$(sed -n 's/^GRUB_CMDLINE_LINUX="\(.*\)"/\1/p' "$TESTBED/stock/grub")
    printf 'menuentry "Debian" {\n  linux /vmlinuz root=/dev/vda1 ro %s\n  initrd /initrd.img\n}\n' "$line"
    printf 'menuentry "Debian beside emulated devices" --hotkey=u {\n  linux /vmlinuz root=/dev/vda1 ro life=emulated %s\n  initrd /initrd.img\n}\n' "$line"
    printf 'menuentry "iPXE" --hotkey=i {\n  linux16 /boot/ipxe.lkrn\n}\n'
  } >"$root/boot/grub/grub.cfg"
  in_tree "$STOCK" "grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /core.img biosdisk part_msdos ext2" ||
    { drop_tree "$root"; die "grub-mkimage: $(tail -n 2 "$STOCK/install.log")"; }
}

# A partition from sector 2048 on; before it GRUB's boot sector, and its core behind that.
write_stock_disk() {
  local image=$STOCK/disk.img.part sectors=$((640 * 2048))
  mv "$root/core.img" "$STOCK/core.img"
  [ "$(stat -c %s "$STOCK/core.img")" -lt $((2047 * 512)) ] || die "GRUB's core is larger than what is before the first partition"
  rm -f "$image"
  truncate -s $((sectors * 512)) "$image"
  mkfs.ext4 -q -q -F -E offset=1048576 -d "$root" "$image" $((sectors / 2 - 1024))k &&
    dd if="$root/usr/lib/grub/i386-pc/boot.img" of="$image" bs=440 count=1 conv=notrunc 2>/dev/null &&
    {
      # Bootable, of Linux, from sector 2048 on.
      printf '\200\040\041\000\203\376\377\377\000\010\000\000'
      printf "$(printf '\\x%02x' $(((sectors - 2048) & 255)) $(((sectors - 2048) >> 8 & 255)) $(((sectors - 2048) >> 16 & 255)) 0)"
    } | dd of="$image" bs=1 seek=446 conv=notrunc 2>/dev/null &&
    printf '\125\252' | dd of="$image" bs=1 seek=510 conv=notrunc 2>/dev/null &&
    dd if="$STOCK/core.img" of="$image" bs=512 seek=1 conv=notrunc 2>/dev/null && mv "$image" "$STOCK/disk.img" ||
    { drop_tree "$root"; die "cannot write $image (is the disk full?)"; }
}

# What dom0 serves to guests that boot from the network: Debian's dnsmasq with its libraries, a kernel and an initial RAM disk for it.
add_net_server() {
  local image boot library
  image=$(mktemp -d)
  boot=$(mktemp -d)
  mkdir -p "$image/net/lib" "$image/net/www"
  cp "$root/usr/sbin/dnsmasq" "$image/net/"
  chroot "$root" ldd /usr/sbin/dnsmasq | awk '$2 == "=>" {print $3} $1 ~ /^\// {print $1}' | while read -r library; do cp -L "$root$library" "$image/net/lib/"; done
  cp "$IMAGES/vmlinuz" "$image/net/www/"
  base_image "$boot"
  install -m 755 "$TESTBED/stock/net-init" "$boot/init"
  copy_modules "$boot" virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk failover net_failover virtio_net
  pack "$boot" "$boot.cpio"
  gzip -1 -n -c "$boot.cpio" >"$image/net/www/initrd.gz"
  install -m 644 "$TESTBED/stock/boot.ipxe" "$image/net/www/boot.ipxe"
  pack "$image" "$STOCK/net.cpio"
  rm -rf "$image" "$boot" "$boot.cpio"
}

# For dom0's initial RAM disk: what finds the disk, and what scenarios are written with.
add_stock() { # FOLDER
  cp "$TESTBED/dom0/stock-lib.sh" "$1/"
  copy_modules "$1" crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft scsi_common scsi_mod libata libahci ahci sd_mod
  # Later kernels have it in their block layer.
  if [ "$RELEASE" = bookworm ]; then copy_modules "$1" t10-pi; else touch "$1/modules/t10-pi.builtin"; fi
}
