# takes: 65 s
# limit: 900 s
# also on: arm64
# What lies behind a disk: a qcow2 image on an NBD server that dies and comes back, a file that grows, a store that runs full.
make_disk /disks/grows.img 32
mkdir -p /small
mount -t tmpfs -o size=12m tmpfs /small
make_disk /small/full.img 32
qemu-img create -q -f qcow2 /disks/q.qcow2 64M
serve_nbd() {
  qemu-storage-daemon --blockdev driver=file,node-name=file,filename=/disks/q.qcow2 \
    --blockdev driver=qcow2,node-name=image,file=file,discard=unmap --nbd-server addr.type=unix,addr.path=/run/nbd.sock \
    --export type=nbd,id=export,node-name=image,name=disk,writable=on >/var/log/xen/xl-nbd.log 2>&1 &
  NBD=$!
  wait_until 20 test -S /run/nbd.sock
}
serve_nbd
# A server that is killed loses what it has not flushed: qcow2 tables in its memory. Write-through keeps what was answered.
# libxl of 4.17 wants a target that exists, so the disk names the image and the profile its server.
profiles '{"guest": "alpha", "device": "xvdg", "onNoSpace": "hold"},
  {"guest": "alpha", "device": "xvdf", "cache": "writethrough",
   "nbd": "nbd+unix:///disk?socket=/run/nbd.sock"}'
start_vxd
remember_resources
write_config alpha "vx.test=store" "$(disk xvde /disks/grows.img)" "$(disk xvdf /disks/q.qcow2)" \
  "$(disk xvdg /small/full.img)"
check "xl create succeeds" create alpha
check "the guest reads back equal checksums from the qcow2 image" wait_console alpha "GUEST CHECKSUMS vdb 5 equal" 400
check "fio verifies on it" wait_console alpha "GUEST VERIFIED vdb" 200

step "the NBD server is killed under I/O and started again"
check "the guest goes on with I/O" wait_console alpha "GUEST WAITING" 100
kill -9 $NBD
rm -f /run/nbd.sock
check "vxd notices" wait_until 60 grep -q "alpha/xvdf: device.storeLost" $VXD_LOG
serve_nbd
check "and is back by itself" wait_until 60 grep -q "alpha/xvdf: device.storeBack" $VXD_LOG
check "the guest saw a pause and nothing else" wait_console alpha "GUEST VERIFIED vdb-again" 300

step "growing a disk"
check "the guest knows the old size" wait_console alpha "GUEST SIZE vda 65536" 100
check "making it smaller is refused" not vxctl resize alpha/xvde 16M
check "making it larger succeeds" vxctl resize alpha/xvde 48M
check "the guest's kernel sees the new size" wait_console alpha "GUEST RESIZED vda 98304" 60
check "and can use what is new" wait_console alpha "GUEST VERIFIED vda-new" 120

step "a store that runs full"
check "the device is held when its store is full" wait_until 200 device_state_is alpha/xvdg held
check "vxctl says why" sh -c "vxctl show alpha/xvdg | grep -q 'No space left'"
vxctl status | sed 's/^/| /'
check "the guest waits" not console_says alpha "WRITTEN"
mount -o remount,size=64m /small
check "the operator makes room and lets it go on" vxctl resume alpha/xvdg
check "the guest's data is complete" wait_console alpha "GUEST WRITTEN vdc equal" 200
check "the guest is content" guest_says_nothing_bad alpha
check "the guest powers off and is gone" wait_gone alpha 120
no_trace_left
stop_vxd
kill $NBD
