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

# fio without a terminal; true when it says that nothing failed. Its seed is the run's, so that another variation writes elsewhere.
run_fio() { # NAME OPTION...
  job=$1
  shift
  fio --name="$job" --randseed="$((${vx_seed:-0} + 1))" --output="/tmp/fio-$job.out" "$@" >"/tmp/fio-$job.err" 2>&1 &&
    ! grep -q 'err= *[1-9]' "/tmp/fio-$job.out"
}

# What fio said that failed, and the kernel beside it.
show_fio() { # WORD NAME : WORD is FAIL, CORRUPT or ERRORS
  say "$1 fio $2: $(grep -h -i -m 3 'verify\|err\|fail' "/tmp/fio-$2.err" "/tmp/fio-$2.out" | tr '\n' ' ')"
  head -n 20 "/tmp/fio-$2.err" | sed 's/^/    fio: /'
  head -n 12 "/tmp/fio-$2.out" | sed 's/^/    fio: /'
  dmesg | tail -n 12 | sed 's/^/    dmesg: /'
}

# With checksums in every block; a mismatch is an error of fio's.
direct_fio() { # NAME OPTION...
  run_fio "$@" --ioengine=libaio --direct=1 --verify=crc32c --verify_fatal=1 --group_reporting
}
verified_io() { # NAME OPTION...
  if direct_fio "$@"; then say "VERIFIED $1"; else show_fio FAIL "$1"; fi
}

# Every queue at work at once, on each disk: random reads and writes, flushes, discards, all verified.
test_queues() {
  wait_for_disks "${vx_disks:-1}"
  describe_disks
  for disk in /sys/block/vd*; do
    name=$(basename "$disk")
    say "QUEUES $name $(ls "$disk/mq" | wc -l) of $(nproc) processors"
    verified_io "$name-writes" --filename="/dev/$name" --rw=randwrite --bsrange=4k-64k --size=2m --offset_increment=8m \
      --numjobs=4 --iodepth=16 --fsync=16 --verify_backlog=64
    verified_io "$name-mixed" --filename="/dev/$name" --rw=randrw --bs=4k --size=512k --offset_increment=8m \
      --numjobs=4 --iodepth=8 --fdatasync=32
    # Each block is discarded, then written; what is discarded alone reads as zeros on these stores.
    verified_io "$name-discards" --filename="/dev/$name" --rw=randtrimwrite --bs=4k --size=512k --offset=32m --iodepth=8
    blkdiscard -o 34603008 -l 1048576 "/dev/$name" || say "FAIL blkdiscard of $name"
    dd if="/dev/$name" bs=64k skip=528 count=16 2>/dev/null | cmp -n 1048576 - /dev/zero && say "ZEROS $name"
  done
  # The scenario looks at the devices now, and shuts this guest down.
  say "DONE"
  while true; do sleep 60; done
}

# A disk of no size that grows and shrinks, then limited writes, then rounds of verified I/O until somebody ends the guest.
test_operate() {
  wait_for_disks 2
  say "FIRST vda $(cat /sys/block/vda/size)"
  say "SPARE vdb $(cat /sys/block/vdb/size)"
  while [ "$(cat /sys/block/vdb/size)" = 0 ]; do usleep 100000; done
  say "ATTACHED vdb $(cat /sys/block/vdb/size)"
  check_filesystem vdb
  say "FREE"
  # The limit comes any moment now: each round of 40 writes tells by its time whether it is there.
  while true; do
    before=$(date +%s)
    run_fio probe --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=4 --size=4m --number_ios=60 ||
      show_fio FAIL probe
    [ $(($(date +%s) - before)) -lt 3 ] || break
  done
  before=$(date +%s)
  run_fio limited --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=4 --size=4m --number_ios=200 ||
    show_fio FAIL limited
  say "LIMITED vda $(($(date +%s) - before))"
  round=0 gone=
  while true; do
    direct_fio round --filename=/dev/vda --rw=randrw --bs=4k --size=2m --iodepth=8 || show_fio FAIL round
    round=$((round + 1))
    say "ROUND $round"
    if [ -z "$gone" ] && [ "$(cat /sys/block/vdb/size)" = 0 ]; then
      gone=yes
      say "DETACHED vdb"
    fi
  done
}

# Verified I/O on every disk at once, in rounds, until somebody ends the guest.
test_crash() {
  wait_for_disks "${vx_disks:-1}"
  describe_disks
  round=0
  while true; do
    for disk in /sys/block/vd*; do
      name=$(basename "$disk")
      (
        direct_fio "$name" --filename="/dev/$name" --rw=randrw --bsrange=4k-64k --size=3m --numjobs=2 --offset_increment=8m --iodepth=16 \
          --fsync=16 || show_fio FAIL "$name"
      ) &
    done
    wait
    round=$((round + 1))
    say "ROUND $round"
  done
}

# What the kernel knows of virtio functions on the PCI bus: as lspci shows it, from the same files.
describe_functions() {
  for function in /sys/bus/pci/devices/*; do
    [ "$(cat "$function/vendor")" = 0x1af4 ] || continue
    say "FUNCTION ${function##*/} id=$(cat "$function/device") class=$(cat "$function/class")" \
      "bar=$(head -n 1 "$function/resource" | cut -d' ' -f1,2 | tr ' ' -)" \
      "driver=$(basename "$(readlink "$function/driver" 2>/dev/null)")" \
      "messages=$(ls "$function/msi_irqs" 2>/dev/null | wc -l)" "capabilities=$(capabilities "$function/config")"
  done
}

byte() { dd if="$1" bs=1 skip="$2" count=1 2>/dev/null | od -An -tu1 | tr -d ' '; }
capabilities() { # CONFIG-SPACE : the list, with the type of each one of virtio's
  local place count=0 out=
  place=$(byte "$1" 52)
  while [ "${place:-0}" != 0 ] && [ $count -lt 32 ]; do
    case $(byte "$1" "$place") in
      17) out="$out,msix" ;;
      9) out="$out,virtio$(byte "$1" $((place + 3)))" ;;
      *) out="$out,other" ;;
    esac
    place=$(byte "$1" $((place + 1)))
    count=$((count + 1))
  done
  echo "${out#,}"
}

# Interrupts of a disk's queues so far, and how they come.
interrupts_of() { # NUMBER-OF-virtioN
  grep "virtio$1-req" /proc/interrupts | awk '{for (i = 2; i <= NF; i++) if ($i ~ /^[0-9]+$/) n += $i; else break} END {print n + 0}'
}
number_of() { basename "$(readlink -f "/sys/block/$1/device")" | sed 's/virtio//'; }

# Functions on the PCI bus, of which vda is what the guest was booted from: what they are, verified I/O with its interrupts counted, a BAR that
# moves, then verified rounds until somebody ends the guest.
test_pci() {
  wait_for_disks "${vx_disks:-2}"
  describe_functions
  describe_disks
  if [ -e /sys/class/net/eth0 ]; then
    { ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up; } || say "FAIL the network device"
    say "RANDOM $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)"
    echo "written to hvc1" >/dev/hvc1
  fi
  check_filesystem vdb
  verified_io vdb --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
  before=$(interrupts_of "$(number_of vdb)")
  # The scenario counts the traps between the two words, and looks when nothing else happens.
  say "COUNTING"
  sleep 8
  run_fio counted --filename=/dev/vdb --ioengine=libaio --direct=1 --rw=randread --bs=4k --iodepth=1 --size=4m --number_ios=100 ||
    show_fio FAIL counted
  say "COUNTED interrupts=$(($(interrupts_of "$(number_of vdb)") - before))"
  sleep 8
  grep 'virtio' /proc/interrupts | tr -s ' ' | while read -r line; do say "IRQ $line"; done
  function=$(readlink -f "$(readlink -f /sys/block/vdb/device)/..")
  old=$(head -n 1 "$function/resource")
  # Where the kernel would not have put it by itself.
  echo "20@${function##*/}" >/sys/bus/pci/resource_alignment
  echo 1 >"$function/remove"
  [ ! -e /sys/block/vdb ] || say "FAIL the disk is still there"
  echo 1 >/sys/bus/pci/rescan
  wait_for_disks "${vx_disks:-2}"
  function=$(readlink -f "$(readlink -f /sys/block/vdb/device)/..")
  say "RESCANNED $(head -n 1 "$function/resource" | cut -d' ' -f1), was ${old%% *}"
  verified_io vdb-again --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
  test_crash
}

# Devices of the profile alone: what they are, and that they work.
test_bare() {
  describe_functions
  { ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 5 10.9.0.1 >/dev/null; } || say "FAIL the network device"
  echo "written to hvc1" >/dev/hvc1
  say "RANDOM $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)"
}

# Every device of the guest's in use for as long as it lives: files written and compared, the network answered on, a console and random numbers.
test_save() {
  { ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up; } || say "FAIL the network device"
  { while true; do
    echo "second $(cut -d. -f1 /proc/uptime), $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c) random bytes" >/dev/hvc1
    sleep 1
  done; } &
  test_load
}

# Where a disk's function is, and its BAR.
function_of() { basename "$(readlink -f "$(readlink -f "/sys/block/$1/device")/..")"; }
bar_of() { head -n 1 "/sys/bus/pci/devices/$1/resource" | cut -d' ' -f1; }

# A program that does everything wrong with the function of vdb, from several seeds, beside disks that are used as they should be; after each of
# them the driver is bound again and works. The first time the guest reboots then: the last sector of the disk that it was booted from knows.
test_hostilepci() {
  wait_for_disks 3
  if dd if=/dev/vda bs=512 skip=65535 count=1 2>/dev/null | grep -q rebooted; then
    say "REBOOTED"
    verified_io vdb --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
    test_crash
    return
  fi
  describe_functions
  verified_io vdb --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
  # The program's pages stay where they are.
  echo 0 >/proc/sys/vm/compact_unevictable_allowed
  victim=$(function_of vdb)
  other=$(bar_of "$(function_of vdc)")
  seed=0
  while [ $seed -lt "${vx_seeds:-4}" ]; do
    seed=$((seed + 1))
    echo "$victim" >/sys/bus/pci/drivers/virtio-pci/unbind
    echo 1 >"/sys/bus/pci/devices/$victim/enable"
    direct_fio beside --filename=/dev/vda --rw=randread --bs=4k --size=4m --iodepth=4 &
    hostile-pci "$victim" $((${vx_seed:-0} + seed)) "${vx_rounds:-300}" "$other" || say "FAIL hostile-pci ended with $?"
    wait
    echo 0 >"/sys/bus/pci/devices/$victim/enable"
    echo 1 >"/sys/bus/pci/devices/$victim/remove"
    echo 1 >/sys/bus/pci/rescan
    wait_for_disks 3
    verified_io "vdb-after-$seed" --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
    verified_io "vdc-after-$seed" --filename=/dev/vdc --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
    say "REFORMED $seed"
  done
  say "REBOOTS"
  printf 'rebooted' | dd of=/dev/vda bs=512 seek=65535 conv=notrunc,fsync 2>/dev/null
  sync
  reboot -f
}

# Verified I/O in rounds through pages that come and go, while the toolstack takes memory away and gives it back.
test_balloon() {
  wait_for_disks 1
  mkdir -p /tmp/mnt
  mkfs.ext4 -q -F /dev/vda
  mount -t ext4 /dev/vda /tmp/mnt
  say "MEMORY $(awk '/MemTotal/ {print $2}' /proc/meminfo)"
  round=0
  while true; do
    run_fio cached --ioengine=psync --directory=/tmp/mnt --rw=write --bs=64k --size=12m --verify=crc32c --do_verify=0 --end_fsync=1 ||
      show_fio CORRUPT cached
    echo 3 >/proc/sys/vm/drop_caches
    run_fio cached --ioengine=psync --directory=/tmp/mnt --rw=read --bs=64k --size=12m --verify=crc32c --verify_fatal=1 ||
      show_fio CORRUPT cached
    echo 3 >/proc/sys/vm/drop_caches
    direct_fio direct --directory=/tmp/mnt --rw=randwrite --bs=32k --size=4m --iodepth=16 || show_fio CORRUPT direct
    round=$((round + 1))
    say "ROUND $round"
  done
}

# Verified I/O in rounds, while the toolstack takes memory away and gives it back. Each round goes through more than half of the
# guest's pages, so that vxd has mapped what the balloon takes, and the guest does I/O with what it gets back.
test_stale() {
  wait_for_disks 1
  mkdir -p /tmp/mnt
  mkfs.ext4 -q -F /dev/vda
  mount -t ext4 /dev/vda /tmp/mnt
  say "MEMORY $(awk '/MemTotal/ {print $2}' /proc/meminfo)"
  run_fio large --ioengine=psync --directory=/tmp/mnt --rw=write --bs=256k --size=72m --verify=crc32c --do_verify=0 --end_fsync=1 ||
    show_fio CORRUPT large
  round=0
  while true; do
    echo 3 >/proc/sys/vm/drop_caches
    run_fio large --ioengine=psync --directory=/tmp/mnt --rw=read --bs=256k --size=72m --verify=crc32c --verify_fatal=1 ||
      show_fio CORRUPT large
    direct_fio direct --directory=/tmp/mnt --rw=randwrite --bs=32k --size=4m --iodepth=16 || show_fio CORRUPT direct
    round=$((round + 1))
    say "ROUND $round"
  done
}

# A disk on an NBD server (vdb), one that grows (vda), one whose store runs full (vdc).
test_store() {
  wait_for_disks 3
  describe_disks
  check_filesystem vdb
  verified_io vdb --filename=/dev/vdb --rw=randrw --bs=4k --size=2m --iodepth=8 --fsync=16
  say "WAITING for the server's end"
  verified_io vdb-again --filename=/dev/vdb --rw=randrw --bs=4k --size=6m --iodepth=8
  sectors=$(cat /sys/block/vda/size)
  say "SIZE vda $sectors"
  while [ "$(cat /sys/block/vda/size)" = "$sectors" ]; do usleep 100000; done
  say "RESIZED vda $(cat /sys/block/vda/size)"
  verified_io vda-new --filename=/dev/vda --rw=write --bs=64k --offset=$((sectors * 512)) --size=8m --iodepth=4
  say "WRITING vdc"
  dd if=/dev/urandom of=/tmp/data bs=64k count=384 2>/dev/null
  dd if=/tmp/data of=/dev/vdc bs=64k conv=fsync 2>/dev/null || say "FAIL write to vdc"
  echo 3 >/proc/sys/vm/drop_caches
  dd if=/dev/vdc bs=64k count=384 2>/dev/null | cmp - /tmp/data && say "WRITTEN vdc equal"
  say "DONE"
}

# Over Xenbus: the driver unbound, bound, unloaded and loaded under I/O, then verified rounds on whatever disks there are, until
# somebody ends the guest. What a disk says when it is taken away is an error; what it must never be is other data.
test_xenbus() {
  wait_for_disks 1
  describe_disks
  for turn in unbind rmmod; do
    fio --name=busy --filename=/dev/vda --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=8 --size=2m --time_based --runtime=60 \
      --output=/tmp/busy.out >/dev/null 2>&1 &
    while [ "$(awk '{print $5}' /sys/block/vda/stat)" -lt 50 ]; do usleep 50000; done
    say "BUSY"
    # In use it stays, as every Xenbus driver does.
    ! rmmod virtio_xenbus 2>/dev/null || say "FAIL rmmod under I/O"
    echo virtio_disk-51712 >/sys/bus/xen/drivers/virtio_xenbus/unbind
    wait
    [ ! -e /sys/block/vda ] || say "FAIL the disk is still there"
    if [ $turn = unbind ]; then
      echo virtio_disk-51712 >/sys/bus/xen/drivers/virtio_xenbus/bind
    else
      rmmod virtio_xenbus || say "FAIL rmmod"
      load virtio_xenbus
    fi
    wait_for_disks 1
    say "BACK $turn"
  done
  round=0
  while true; do
    disks=$(cd /sys/block && ls -d vd* 2>/dev/null | tr '\n' ' ')
    for name in $disks; do
      (
        direct_fio "$name" --filename="/dev/$name" --rw=randrw --bsrange=4k-64k --size=2m --iodepth=8 --fsync=16 && exit
        # A read of a disk that is taken away ends like one behind the disk's end, with 0 bytes and no error (the kernel sets the capacity
        # to 0 first), and fio with libaio then verifies its buffer as if data had come: "bad header". That is the end of the disk.
        if grep -qi 'verify\|crc' "/tmp/fio-$name.err" && [ "$(cat "/sys/block/$name/size" 2>/dev/null || echo 0)" != 0 ]; then
          show_fio CORRUPT "$name"
        fi
        show_fio ERRORS "$name"
      ) &
    done
    wait
    round=$((round + 1))
    say "ROUND $round $disks"
    [ -n "$disks" ] || usleep 300000
  done
}

# Verified rounds on vda, while disks come and go whose backend lies: their reads may fail, or hang as long as they are there, nothing else.
test_hostile() {
  dmesg -n 5
  wait_for_disks 1
  round=0
  while true; do
    direct_fio vda --filename=/dev/vda --rw=randrw --bsrange=4k-64k --size=1m --iodepth=8 --fsync=16 || show_fio FAIL vda
    others=$(cd /sys/block && ls -d vd[b-z]* 2>/dev/null | tr '\n' ' ')
    for name in $others; do
      [ -e "/tmp/probe-$name" ] || { : >"/tmp/probe-$name"; probe_disk "$name" & }
    done
    round=$((round + 1))
    # What the disk stands for in memory: kernel threads that wait, and pages.
    say "ROUND $round disks vda $others. devices $(ls /sys/bus/virtio/devices | wc -l) free $(awk '/^MemFree/ {print $2}' /proc/meminfo)"
  done
}

probe_disk() { # NAME
  # Pages that the page cache reads into next were somebody's secret just now.
  yes vx-SECRET | head -c 6m >/tmp/secret
  rm -f /tmp/secret
  for turn in 1 2 3 4 5 6 7 8; do
    [ -e "/sys/block/$1" ] || break
    if dd if="/dev/$1" of=/tmp/probed bs=16k count=64 skip=$((turn * 64)) 2>/dev/null && [ "$(wc -c </tmp/probed)" = 1048576 ]; then
      say "PROBE $1 read $(tr -d '\0' </tmp/probed | wc -c)"
    else
      say "PROBE $1 failed"
    fi
    # Without its node dd would make a file of that name, and the next disk would have none.
    [ -b "/dev/$1" ] && dd if=/tmp/probed of="/dev/$1" bs=16k count=8 oflag=direct 2>/dev/null
  done
  [ -b "/dev/$1" ] || rm -f "/dev/$1"
  rm -f /tmp/probed "/tmp/probe-$1"
}

# Does what the scenario says over a port of a virtio console: each line "NUMBER COMMAND" is answered with its output, each line after a
# '|', and "NUMBER done CODE".
test_serve() {
  mkdir -p /dev/virtio-ports
  tries=0
  until name_ports; [ -e /dev/virtio-ports/vx.command ]; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { say "FAIL no port vx.command: $(grep . /sys/class/virtio-ports/*/name)"; dmesg | tail -n 30; finish; }
    usleep 100000
  done
  ip link set lo up
  say "SERVES $(ls /dev/virtio-ports | tr '\n' ' ')"
  exec 3<>/dev/virtio-ports/vx.command
  while read -r number command <&3; do
    sh -c "$command" >/tmp/serve.out 2>&1 </dev/null
    code=$?
    { sed 's/^/|/' /tmp/serve.out; echo "$number done $code"; } >&3
  done
  say "FAIL the command port is at its end"
}

# What udev does for ports with names.
name_ports() {
  for port in /sys/class/virtio-ports/*/name; do
    [ -e "$port" ] || continue
    node=${port%/name}
    ln -sf "../${node##*/}" "/dev/virtio-ports/$(cat "$port")"
  done
}
