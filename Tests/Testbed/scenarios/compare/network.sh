# limit: 3000 s
# needs: xenbus
# needs: compare
# processors: 3
# dom0 processors: 1
# Benchmarks/compare: TCP both ways and small packets of a PV and a PVH guest, by netback and by vxd over Xenbus, with the bridge and iperf3's server
# in dom0 and in a PVH driver domain. See block.sh.
. /compare/lib.sh
part=network

# vxd's devices are plugged into guests that run; for the first one of a name there is a domain to wait for.
attach() { # NAME BACKEND
  until xl domid "$1" >/dev/null 2>&1; do usleep 100000; done
  vxctl attach "$1" network --backend "$2" --options '{"bridge": "br0"}' >/tmp/attach.out 2>&1 || sed 's/^/| /' /tmp/attach.out
}
attach_dom0() { attach "$1" 0; }
attach_driver() { attach "$1" driver; }
BRIDGE='load_modules llc stp bridge tun xen-netback; brctl addbr br0; ip addr add 10.7.0.1/24 dev br0; ip link set br0 up; iperf3 -s -D </dev/null >/dev/null 2>&1; packets serve </dev/null >/dev/null 2>&1 &'

load_modules llc stp bridge tun xen-netback
brctl addbr br0
ip addr add 10.7.0.1/24 dev br0
ip link set br0 up
iperf3 -s -D >/dev/null 2>&1
packets serve &
for type in pv pvh; do guest netback-dom0-$type $type netfront 'vif = [ "bridge=br0,script=vif-bridge" ]'; done
start_vxd
for type in pv pvh; do BESIDE=attach_dom0 guest vxd-dom0-$type $type virtio ''; done
stop_vxd

driver_domain
in_driver "$BRIDGE"
in_driver kill_vxd
for type in pv pvh; do
  in_driver ". /compare/driver-lib.sh; plug vif </dev/null >/dev/null 2>&1 &"
  guest netback-driver-$type $type netfront 'vif = [ "bridge=br0,script=vif-bridge,backend=driver" ]'
done
in_driver start_vxd
for type in pv pvh; do BESIDE=attach_driver guest vxd-driver-$type $type virtio ''; done
