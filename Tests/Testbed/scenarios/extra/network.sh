# takes: 141 s
# limit: 900 s
# needs: xenbus
# processors: 5
# Network devices that are plugged into running PVH guests, over Xenbus: two guests on one bridge with dom0. Their consoles are plugged
# in too; where libxl knows such devices (4.18 and later, on trixie) the guests' configurations have them.
load_modules llc stp bridge tun garp mrp 8021q veth macvlan tap macvtap
for bridge in br0 br9; do brctl addbr $bridge; done
ip addr add 10.9.0.1/24 dev br0
ip addr add 10.9.9.1/24 dev br9
for bridge in br0 br9; do ip link set $bridge up; done
iperf3 -s -D >/dev/null
[ $RELEASE = bookworm ] || GUEST_VIRTIO=3
network_profiles() { # GUEST_ONE_MEMBERS : for vxd's next start, or for "vxctl reload"
  members=${1:-}
  for guest in one two; do
    [ $RELEASE = bookworm ] ||
      members="\"devices\": [{\"type\": \"console\", \"create\": false, \"ports\": [{\"name\": \"vx.command\", \"pty\": \"/run/$guest.command\"}]}]${members:+, $members}"
    echo "{\"guest\": \"$guest\"${members:+, $members}}"
    members=
  done | paste -s -d , | sed 's/.*/{"version": 1, "guests": [&]}/' >/etc/vxd/profiles.json
}
network_profiles
start_vxd
remember_resources
GUEST_MEMORY=360
write_direct_config pvh one "vx.test=serve"
GUEST_VCPUS=2
write_direct_config pvh two "vx.test=serve"
step "two guests without a disk"
for guest in one two; do check "$guest: xl create" create $guest; done
for guest in one two; do check "$guest is up" wait_console $guest "GUEST UP" 200; done
plug() { vxctl attach "$1" "$2" --backend 0 --options "$3"; }
for guest in one two; do
  [ $RELEASE != bookworm ] ||
    check "$guest: a console is plugged in" plug $guest console "{\"ports\": [{\"name\": \"vx.command\", \"pty\": \"/run/$guest.command\"}]}"
  check "$guest serves over a port of it" wait_console $guest "GUEST SERVES" 60
done

step "network devices are plugged in"
# Their options stand in the order of their numbers; the guest's interfaces are found by the addresses.
check "one: with all offloads" plug one network '{"bridge": "br0", "mac": "00:16:3e:00:00:01"}'
check "one: an MTU of 9000" plug one network '{"bridge": "br9", "mac": "00:16:3e:00:09:01", "mtu": 9000}'
check "two: with two queue pairs and a lock on its addresses" plug two network \
  '{"bridge": "br0", "mac": "00:16:3e:00:00:02", "queues": 2, "addresses": ["10.9.0.3", "10.9.5.3"], "vlans": [5]}'
vxctl list | sed 's/^/| /'
interface() { in_guest "$1" "cd /sys/class/net; grep -l '$2' */address | cut -d/ -f1"; }
set_up() { # GUEST ADDRESS MAC
  name=$(interface "$1" "$3")
  in_guest "$1" "ip addr add $2 dev $name && ip link set $name up"
}
check "addresses" set_up one 10.9.0.2/24 00:16:3e:00:00:01
check "two's" set_up two 10.9.0.3/24 00:16:3e:00:00:02
echo "| features: $(in_guest one 'cat /sys/class/net/eth0/device/features')"
# VIRTIO_NET_F_GUEST_USO4 and 6, VIRTIO_NET_F_HOST_USO: Linux has them since 6.2, in dom0 and in the guest.
[ $RELEASE = bookworm ] ||
  check "UDP segmentation is used in both directions" equal "$(in_guest one 'cut -c 55-57 /sys/class/net/eth0/device/features')" 111

step "ping at all sizes"
for size in 0 64 1472 1473 30000 65000; do
  check "dom0 to a guest, $size bytes" ping -c 2 -W 5 -s $size 10.9.0.2
done
for size in 1 20000; do check "guest to guest, $size bytes" in_guest one "ping -c 2 -W 5 -s $size 10.9.0.3"; done

step "TCP and UDP, with all offloads"
# By the amount rather than by time: how much a second of the emulated clock carries depends on what is measured.
# iperf3 of trixie sees that its bytes are through when a timer wakes it: without reports (-i 0) it has none.
iperf() { # WHAT GUEST ARGUMENT...
  title=$1 from=$2
  shift 2
  in_guest "$from" "iperf3 -i 0.1 $*" >/tmp/iperf.out 2>&1
  code=$?
  check "$title: $(sed -n 's/.* \([0-9.]* [MGK]bits\/sec\).*receiver.*/\1/p' /tmp/iperf.out | tail -n 1)" ran $code
}
ran() { [ "$1" = 0 ] || { cat /tmp/iperf.out; return 1; }; }
iperf "TCP from a guest" one -c 10.9.0.1 -n 24M
iperf "TCP to a guest" one -c 10.9.0.1 -R -n 24M
iperf "TCP from a guest with two queue pairs" two -c 10.9.0.1 -P 2 -n 24M
iperf "UDP from a guest" one -c 10.9.0.1 -u -b 20M -t 1
iperf "UDP to a guest" one -c 10.9.0.1 -u -b 20M -R -t 1
in_guest two "iperf3 -s -D"
iperf "TCP from guest to guest" one -c 10.9.0.3 -n 24M
per_packet() { # COUNTER-OF-BYTES COUNTER-OF-PACKETS
  echo $(($(device_field one/net1 "$1") / $(device_field one/net1 "$2")))
}
check "packets from the guest had $(per_packet writtenBytes writes) bytes: segmented behind it" test "$(per_packet writtenBytes writes)" -gt 1600
vxctl show two/net1 --json | tr -d ' \n' | sed -n 's/.*"requestsByQueue":\(\[[0-9,]*\]\).*/| requests of each queue: \1\n/p'
check "both queue pairs carried packets" sh -c "vxctl show two/net1 --json | tr -d ' \n' | grep -q 'requestsByQueue.:\[[1-9][0-9]*,[1-9][0-9]*,[1-9][0-9]*,[1-9]'"

step "a limit"
check "vxctl limit" vxctl limit one/net1 --write-bytes 500000
in_guest one "iperf3 -i 0 -t 4 -c 10.9.0.1" >/tmp/iperf.out 2>&1
grep receiver /tmp/iperf.out | sed 's/^/| /'
limited() { awk '/receiver/ {exit !($(NF - 2) * ($(NF - 1) ~ /^M/ ? 1000 : $(NF - 1) ~ /^K/ ? 1 : 1000000) < 6000)}' /tmp/iperf.out; }
check "500000 bytes a second are no more than 6 Mbit/s, with what was saved up" limited
vxctl limit one/net1 --write-bytes 0 >/dev/null
iperf "TCP without it again" one -c 10.9.0.1 -n 24M

step "each offload off"
turn=2
for option in checksum tso mergeable; do
  check "without $option" plug one network "{\"bridge\": \"br0\", \"mac\": \"00:16:3e:00:0$turn:01\", \"$option\": false}"
  in_guest one "ip addr del 10.9.0.2/24 dev $(interface one 00:16:3e:00:00:01)"
  set_up one 10.9.0.2/24 00:16:3e:00:0$turn:01
  arp -d 10.9.0.2
  check "it is reached" wait_until 20 ping -c 1 -W 1 10.9.0.2
  iperf "TCP from the guest" one -c 10.9.0.1 -n 24M
  iperf "TCP to the guest" one -c 10.9.0.1 -R -n 24M
  check "it is unplugged" vxctl detach one/net3 --xenbus
  check "its tap is gone" wait_until 20 sh -c "[ \$(ls /sys/class/net/br0/brif | wc -l) = 2 ]"
  set_up one 10.9.0.2/24 00:16:3e:00:00:01
  turn=$((turn + 1))
done

step "100 MiB over TCP while vxd is killed, and 32 MiB the other way"
check "a file of random bytes" in_guest one "mkdir /tmp/out && dd if=/dev/urandom of=/tmp/out/file bs=128k count=800 2>/dev/null"
mkdir /tmp/out
dd if=/dev/urandom of=/tmp/out/file bs=128k count=256 2>/dev/null
# iperf3 would do for speed, but its server may end before it has read everything.
httpd -p 8080 -h /tmp/out
in_guest one "httpd -p 8080 -h /tmp/out"
# All of it would take a second of the emulated clock. A limit that vxctl sets would end with the daemon; a profile's holds from the start.
network_profiles '"limits": {"writeBytes": 30000000}'
check "a limit for the guest" vxctl reload
received() { stat -c %s /tmp/received 2>/dev/null || echo 0; }
has_received() { [ "$(received)" -ge "$1" ]; }
(wget -q -O /tmp/received http://10.9.0.2:8080/file; touch /tmp/complete) &
in_guest one "(wget -q -O /tmp/received http://10.9.0.1:8080/file; touch /tmp/complete) >/dev/null 2>&1 &"
for bytes in 3000000 40000000; do
  POLL=20000
  check "$bytes bytes are there" wait_until 100 has_received $bytes
  POLL=
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  check "the taps stay in the bridge while nobody serves them" equal "$(ls /sys/class/net/br0/brif | wc -l)" 2
  check "not all of it is there yet" not has_received 104857600
  start_vxd
  check "served again" wait_until 60 device_state_is one/net1 connected
done
check "it arrives" wait_until 200 test -e /tmp/complete
check "as it was" equal "$(received) $(md5sum </tmp/received)" "104857600 $(in_guest one "md5sum </tmp/out/file")"
check "the other file arrives too" wait_until 100 in_guest one "test -e /tmp/complete"
check "as it was" equal "$(in_guest one "md5sum </tmp/received")" "$(md5sum </tmp/out/file)"
rm /tmp/received
in_guest one "rm /tmp/out/file /tmp/received"
network_profiles
check "no limit any more" vxctl reload

step "interfaces of somebody else's"
tunctl -t tap7 >/dev/null
brctl addif br9 tap7
ip link set tap7 up
ip link add name v0 type veth
ip link add link v0 name mv0 type macvtap
ip addr add 10.9.7.1/24 dev veth0
for name in v0 veth0 mv0; do ip link set $name up; done
macvtap=$(cat /sys/class/net/mv0/address)
check "a tap" plug one network '{"tap": "tap7", "mac": "00:16:3e:00:07:01"}'
check "a macvtap" plug one network "{\"macvtap\": \"mv0\", \"mac\": \"$macvtap\"}"
set_up one 10.9.9.7/24 00:16:3e:00:07:01
set_up one 10.9.7.2/24 "$macvtap"
check "the guest is reached over the tap" ping -c 2 -W 5 -s 3000 -I br9 10.9.9.7
check "and over the macvtap" ping -c 2 -W 5 -s 3000 10.9.7.2
iperf "TCP from the guest over the macvtap" one -c 10.9.7.1 -n 24M
iperf "TCP to the guest over the macvtap" one -c 10.9.7.1 -R -n 24M
kill -9 "$(vxd_pid)"
wait "$(vxd_pid)" 2>/dev/null
start_vxd
check "over both after kill -9 of vxd" wait_until 60 sh -c "ping -c 1 -W 1 10.9.7.2 && ping -c 1 -W 1 10.9.9.7"
for device in net3 net4; do check "$device is unplugged" vxctl detach one/$device --xenbus; done
check "both interfaces are there as before" sh -c "ls /sys/class/net | grep -q tap7 && ls /sys/class/net | grep -q mv0"
tunctl -d tap7 >/dev/null
ip link del mv0

if [ $RELEASE != bookworm ]; then
  step "a bridge of Open vSwitch"
  load_modules nf_defrag_ipv4 nf_defrag_ipv6 crc32c_generic libcrc32c nf_conntrack nf_nat nf_conncount nsh psample openvswitch
  mkdir -p /etc/openvswitch /run/openvswitch
  ovsdb-tool create /etc/openvswitch/conf.db /usr/share/openvswitch/vswitch.ovsschema
  ovsdb-server --remote=punix:/run/openvswitch/db.sock --detach --pidfile --no-chdir /etc/openvswitch/conf.db >/tmp/ovs.out 2>&1
  ovs-vsctl --no-wait init >>/tmp/ovs.out 2>&1
  ovs-vswitchd --detach --pidfile --no-chdir >>/tmp/ovs.out 2>&1
  check "it is there" ovs-vsctl add-br ovs0
  ip addr add 10.9.6.1/24 dev ovs0
  ip link set ovs0 up
  check "a device in it" plug one network '{"bridge": "ovs0", "mac": "00:16:3e:00:06:01"}'
  set_up one 10.9.6.2/24 00:16:3e:00:06:01
  check "is reached" wait_until 20 ping -c 1 -W 1 -s 3000 10.9.6.2
  iperf "TCP from the guest" one -c 10.9.6.1 -n 24M
  check "it is unplugged" vxctl detach one/net3 --xenbus
  check "and no port of it is left" equal "$(ovs-vsctl list-ports ovs0)" ""
fi

step "link, MTU, VLANs, filters, locks"
check "vxctl link down" vxctl link one/net1 down
carrier() { in_guest one "grep -q $1 /sys/class/net/$(interface one 00:16:3e:00:00:01)/carrier"; }
check "the guest sees it" wait_until 60 carrier 0
check "nothing gets through" not ping -c 1 -W 2 10.9.0.2
check "vxctl link up" vxctl link one/net1 up
check "the guest sees that too" wait_until 20 carrier 1
check "and is reached" wait_until 30 ping -c 1 -W 1 10.9.0.2
ip link set br9 mtu 9000
set_up one 10.9.9.2/24 00:16:3e:00:09:01
check "the guest took an MTU of 9000 from the device" in_guest one "grep -q 9000 /sys/class/net/$(interface one 00:16:3e:00:09:01)/mtu"
check "ping in one packet of 9000 bytes" ping -c 2 -W 5 -s 8972 10.9.9.2
vconfig add br0 5 >/dev/null
ip addr add 10.9.5.1/24 dev br0.5
ip link set br0.5 up
in_guest two "for m in llc stp garp mrp 8021q; do insmod /modules/\$m.ko; done; vconfig add eth0 5; ip addr add 10.9.5.3/24 dev eth0.5; ip link set eth0.5 up" >/dev/null
check "a VLAN" ping -c 2 -W 5 10.9.5.3
drops() { device_field "$1" "$2"; }
arp -s 10.9.0.77 02:00:00:00:00:77
filtered=$(drops two/net1 filtered)
ping -c 3 -W 1 10.9.0.77 >/dev/null
check "what is for somebody else is filtered" test "$(drops two/net1 filtered)" -gt "$filtered"
in_guest two "ip link set eth0 promisc on"
seen=$(in_guest two "cat /sys/class/net/eth0/statistics/rx_packets")
filtered=$(drops two/net1 filtered)
ping -c 3 -W 1 10.9.0.77 >/dev/null
check "unless the guest is promiscuous" test "$(in_guest two 'cat /sys/class/net/eth0/statistics/rx_packets')" -ge $((seen + 3)) -a "$(drops two/net1 filtered)" = "$filtered"
in_guest two "ip addr add 10.9.0.99/24 dev eth0; ping -c 2 -W 1 -I 10.9.0.99 10.9.0.1" >/dev/null
check "an address that is not the guest's is held back" test "$(drops two/net1 foreignIP)" -gt 0
in_guest two "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ping -c 2 -W 1 10.9.0.1" >/dev/null
check "a hardware address that is not the guest's too" test "$(drops two/net1 foreignMAC)" -gt 0
vxctl metrics | grep -E '^vxd_device_drops_total.*[1-9]$' | sed 's/^/| /'

step "the end"
xl destroy one
check "xl shutdown" xl shutdown two
check "the guests are gone" wait_gone two 60
check "no tap is left" wait_until 30 sh -c "! ls /sys/class/net | grep -q '^vx'"
check "and nothing in the bridge" equal "$(ls /sys/class/net/br0/brif | wc -l)" 0
check "no entry is left" wait_until 20 not xenstore-exists /local/domain/0/backend/virtio
wait_until 20 equal_now guests 0
no_trace_left
