# limit: 3000 s
# needs: xenbus
# needs: compare
# processors: 3
# dom0 processors: 1
# Benchmarks/compare: requests of a PV and a PVH guest on a RAM disk, by blkback and by vxd over Xenbus, in dom0 and in a PVH driver domain. While a
# guest measures nothing else runs in dom0: xl waits for the guest's end without asking.
. /compare/lib.sh

ram_disk() {
  insmod /modules/brd.ko rd_nr=1 rd_size=65536 && dd if=/dev/zero of=/dev/ram0 bs=1M count=64 2>/dev/null
}
ram_disk
load_modules xen-blkback
for type in pv pvh; do
  guest blkback-dom0-$type $type blkfront 'disk = [ "format=raw, vdev=xvda, access=rw, backendtype=phy, target=/dev/ram0" ]'
done
start_vxd
for type in pv pvh; do guest vxd-dom0-$type $type virtio "disk = [ $(disk xvda /dev/ram0) ]"; done
stop_vxd

driver_domain
check "its RAM disk" in_driver "insmod /modules/brd.ko rd_nr=1 rd_size=65536 && dd if=/dev/zero of=/dev/ram0 bs=1M count=64 2>/dev/null; load_modules xen-blkback"
in_driver kill_vxd
for type in pv pvh; do
  in_driver ". /compare/driver-lib.sh; plug vbd </dev/null >/dev/null 2>&1 &"
  guest blkback-driver-$type $type blkfront 'disk = [ "format=raw, vdev=xvda, access=rw, backend=driver, backendtype=phy, target=/dev/ram0" ]'
done
in_driver start_vxd
for type in pv pvh; do guest vxd-driver-$type $type virtio "disk = [ $(driver_disk xvda /dev/ram0) ]"; done
