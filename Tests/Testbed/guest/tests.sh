# What the testbed's guest can do; sourced by its init, which calls test_NAME.

wait_for_disks() { # COUNT : virtio disks
  tries=0
  while [ "$(ls -d /sys/block/vd* 2>/dev/null | wc -l)" -lt "$1" ]; do
    tries=$((tries + 1))
    if [ $tries -gt 300 ]; then
      say "FAIL expected $1 disks, found: $(ls /sys/block | tr '\n' ' ')"
      dmesg | tail -n 30
      finish
    fi
    usleep 100000
  done
}

# Makes a file system on a disk, writes files, and reads them back from the device with equal checksums.
check_filesystem() { # DEVICE
  mkdir -p "/tmp/mnt-$1"
  mkfs.ext4 -q -F "/dev/$1" || { say "FAIL mkfs.ext4 on $1"; return 1; }
  mount -t ext4 "/dev/$1" "/tmp/mnt-$1" || { say "FAIL mount of $1"; return 1; }
  say "FILESYSTEM $1"
  for size in 1 7 64 513 2000; do
    dd if=/dev/urandom of="/tmp/mnt-$1/file-$size" bs=1k count=$size 2>/dev/null
  done
  (cd "/tmp/mnt-$1" && sha256sum file-* >sums)
  sync
  umount "/tmp/mnt-$1"
  echo 3 >/proc/sys/vm/drop_caches
  mount -t ext4 "/dev/$1" "/tmp/mnt-$1" || { say "FAIL second mount of $1"; return 1; }
  if (cd "/tmp/mnt-$1" && sha256sum -c sums >/tmp/sums.out); then
    say "CHECKSUMS $1 $(grep -c OK /tmp/sums.out) equal"
  else
    say "FAIL checksums on $1 differ"
  fi
  umount "/tmp/mnt-$1"
}

describe_disks() {
  for disk in /sys/block/vd*; do
    name=$(basename "$disk")
    say "DISK $name sectors=$(cat "$disk/size") ro=$(cat "$disk/ro") block=$(cat "$disk/queue/logical_block_size")" \
      "serial=$(cat "$disk/serial") discard=$(cat "$disk/queue/discard_max_bytes")" \
      "wz=$(cat "$disk/queue/write_zeroes_max_bytes") cache=$(cat "$disk/queue/write_cache" | tr ' ' -)" \
      "features=$(cat "$disk/device/features")"
  done
  say "INTERRUPTS $(grep virtio /proc/interrupts | tr -s ' ' | tr '\n' ';')"
}

# File system on every disk, then power off.
test_fs() {
  wait_for_disks "${vx_disks:-1}"
  describe_disks
  for disk in /sys/block/vd*; do check_filesystem "$(basename "$disk")"; done
  say "DONE"
}

# Endless verified writes until somebody ends the guest.
test_load() {
  wait_for_disks "${vx_disks:-1}"
  mkdir -p /tmp/mnt
  mkfs.ext4 -q -F /dev/vda
  mount -t ext4 /dev/vda /tmp/mnt
  round=0
  while true; do
    dd if=/dev/urandom of=/tmp/mnt/round bs=64k count=16 conv=fsync 2>/dev/null || say "FAIL write in round $round"
    cat /tmp/mnt/round >/tmp/copy
    echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp/copy /tmp/mnt/round || say "FAIL compare in round $round"
    round=$((round + 1))
    say "ROUND $round"
  done
}
