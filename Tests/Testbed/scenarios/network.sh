# limit: 1000 s
# processors: 5
# Network devices: two guests on one bridge with dom0, declared by profiles (this libxl has no word for them).
for module in llc stp bridge tun garp mrp 8021q; do insmod /modules/$module.ko; done
brctl addbr br0
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
brctl addbr br9
ip link set br9 up
iperf3 -s -D >/dev/null
cat >/etc/vxd/profiles.json <<'JSON'
{"version": 1, "guests": [
  {"guest": "one", "devices": [
    {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:00:01"},
    {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:01:01", "checksum": false},
    {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:02:01", "tso": false},
    {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:03:01", "mergeable": false},
    {"type": "network", "bridge": "br9", "mac": "00:16:3e:00:09:01", "mtu": 9000},
    {"type": "console", "ports": [{"name": "vx.command", "pty": "/run/one.command"}]},
    {"type": "entropy"}]},
  {"guest": "two", "devices": [
    {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:00:02", "queues": 2, "addresses": ["10.9.0.3", "10.9.5.3"]},
    {"type": "console", "ports": [{"name": "vx.command", "pty": "/run/two.command"}]}]}]}
JSON
start_vxd
check "vxctl checks the profiles" vxctl config check /etc/vxd/profiles.json
remember_resources
GUEST_MEMORY=256
write_config one "vx.test=serve"
GUEST_VCPUS=2 GUEST_CPUS="3-4"
write_config two "vx.test=serve"
step "two guests without a disk, whose devices are their profiles'"
check "xl creates the first" create one
check "the first serves over its console port" wait_console one "GUEST SERVES" 300
check "xl creates the second" create two
check "the second too" wait_console two "GUEST SERVES" 300
vxctl list | sed 's/^/| /'
echo "| one: $(in_guest one 'ls /sys/class/net /sys/bus/virtio/devices | tr "\\n" " "')"
echo "| features of net0: $(in_guest one 'cat /sys/class/net/eth0/device/features')"
check "the random number generator is the guest's" in_guest one "grep -q virtio /sys/class/misc/hw_random/rng_current && dd if=/dev/hwrng of=/tmp/random bs=4096 count=4 && [ \$(tr -d '\\000' </tmp/random | wc -c) -gt 16000 ]"

# Interfaces by hardware address, whatever their order.
eth() { in_guest one "cd /sys/class/net; grep -l '$1' */address | cut -d/ -f1"; }
set_up() { # ADDRESS MAC
  name=$(eth "$2")
  in_guest one "ip addr add $1 dev $name && ip link set $name up"
}
check "addresses" set_up 10.9.0.2/24 00:16:3e:00:00:01
check "the second guest's" in_guest two "ip addr add 10.9.0.3/24 dev eth0 && ip link set eth0 up"

step "ping at all sizes"
for size in 0 1 64 1472 1473 4000 30000 65000; do
  check "dom0 to a guest, $size bytes" ping -c 2 -W 5 -s $size 10.9.0.2
done
for size in 1 1472 20000; do
  check "guest to guest, $size bytes" in_guest one "ping -c 2 -W 5 -s $size 10.9.0.3"
done

step "TCP and UDP, with all offloads"
speed() { sed -n 's/.* \([0-9.]* [MGK]bits\/sec\).*receiver.*/\1/p' /tmp/iperf.out | tail -n 1; }
iperf() { # WHAT GUEST ARGUMENT...
  what=$1 from=$2
  shift 2
  GUEST_LIMIT=60 in_guest "$from" "iperf3 -i 0 -t 3 $*" >/tmp/iperf.out 2>&1
  code=$?
  check "$what: $(speed)" test $code = 0
}
iperf "TCP from a guest" one -c 10.9.0.1
iperf "TCP to a guest" one -c 10.9.0.1 -R
iperf "TCP from a guest with two queue pairs" two -c 10.9.0.1 -P 2
iperf "UDP from a guest" one -c 10.9.0.1 -u -b 20M
iperf "UDP to a guest" one -c 10.9.0.1 -u -b 20M -R
in_guest two "iperf3 -s -D"
iperf "TCP from guest to guest" one -c 10.9.0.3
check "segments larger than the wire's were sent and received" sh -c \
  "[ \$(vxctl show one/net0 --json | sed -n 's/.*\"writtenBytes\": \([0-9]*\).*/\1/p' | head -n 1) -gt \$((3000 * \$(vxctl show one/net0 --json | sed -n 's/.*\"writes\": \([0-9]*\).*/\1/p' | head -n 1))) ]"
check "both queue pairs carried packets" sh -c "vxctl show two/net0 --json | grep -A 8 requestsByQueue | tr -d ' \n' | grep -q 'requestsByQueue.:\[[1-9][0-9]*,[1-9][0-9]*,[1-9]'"

step "each offload off"
number=1
for what in "without checksums" "without segmentation" "without merged buffers"; do
  in_guest one "ip link set \$(cd /sys/class/net; grep -l '00:16:3e:00:00:01' */address | cut -d/ -f1) down; ip addr flush dev eth$((number - 1)) 2>/dev/null; true"
  set_up 10.9.0.2/24 00:16:3e:00:0$number:01
  wait_until 20 ping -c 1 -W 1 10.9.0.2
  iperf "TCP $what, from the guest" one -c 10.9.0.1
  iperf "TCP $what, to the guest" one -c 10.9.0.1 -R
  in_guest one "n=\$(cd /sys/class/net; grep -l '00:16:3e:00:0$number:01' */address | cut -d/ -f1); ip addr flush dev \$n; ip link set \$n down"
  number=$((number + 1))
done
in_guest one "n=\$(cd /sys/class/net; grep -l '00:16:3e:00:00:01' */address | cut -d/ -f1); ip addr flush dev \$n; ip link set \$n up"
set_up 10.9.0.2/24 00:16:3e:00:00:01

step "100 MB over TCP while vxd is killed"
content="seq 1 20000000 | head -c 104857600"
expected=$(seq 1 20000000 | head -c 104857600 | md5sum)
in_guest two "(nc -l -p 5000 | md5sum >/tmp/received; mv /tmp/received /tmp/complete) >/dev/null 2>&1 &"
in_guest one "($content | nc 10.9.0.3 5000) >/dev/null 2>&1 &"
before=$(device_field one/net0 writtenBytes)
moved() { [ "$(device_field one/net0 writtenBytes)" -gt $((before + 10000000)) ]; }
check "the transfer is under way" wait_until 60 moved
kill -9 "$(vxd_pid)"
wait "$(vxd_pid)" 2>/dev/null
check "the taps are there while nobody serves them" test -e /sys/class/net/br0/brif/vx$(xl domid one).0n
start_vxd
check "both are served again" wait_until 60 device_state_is one/net0 connected
check "it arrives" wait_until 200 in_guest two "test -e /tmp/complete"
check "as it was" equal "$(in_guest two 'cat /tmp/complete')" "$expected"

step "link, MTU, VLANs, filters"
check "vxctl link down" vxctl link one/net0 down
check "the guest sees it" wait_until 20 in_guest one "grep -q 0 /sys/class/net/eth0/carrier"
check "nothing gets through" not ping -c 1 -W 2 10.9.0.2
check "vxctl link up" vxctl link one/net0 up
check "the guest sees that too" wait_until 20 in_guest one "grep -q 1 /sys/class/net/eth0/carrier"
check "and is reached" wait_until 30 ping -c 1 -W 1 10.9.0.2
ip link set br9 mtu 9000
ip addr add 10.9.9.1/24 dev br9
set_up 10.9.9.2/24 00:16:3e:00:09:01
check "the guest took an MTU of 9000 from the device" in_guest one "grep -q 9000 /sys/class/net/$(eth 00:16:3e:00:09:01)/mtu"
check "ping in one packet of 9000 bytes" ping -c 2 -W 5 -s 8972 10.9.9.2
vconfig add br0 5 >/dev/null
ip addr add 10.9.5.1/24 dev br0.5
ip link set br0.5 up
in_guest two "for m in llc stp garp mrp 8021q; do insmod /modules/\$m.ko; done; vconfig add eth0 5; ip addr add 10.9.5.3/24 dev eth0.5; ip link set eth0.5 up"
check "a VLAN" ping -c 2 -W 5 10.9.5.3
drops() { vxctl show "$1" --json | sed -n "s/.*\"$2\": \([0-9]*\).*/\1/p" | head -n 1; }
arp -s 10.9.0.77 02:00:00:00:00:77
filtered=$(drops two/net0 filtered)
ping -c 3 -W 1 10.9.0.77 >/dev/null
check "what is for somebody else is filtered" test "$(drops two/net0 filtered)" -gt "$filtered"
in_guest two "ip link set eth0 promisc on"
seen=$(in_guest two "cat /sys/class/net/eth0/statistics/rx_packets")
filtered=$(drops two/net0 filtered)
ping -c 3 -W 1 10.9.0.77 >/dev/null
check "unless the guest is promiscuous" test "$(in_guest two 'cat /sys/class/net/eth0/statistics/rx_packets')" -ge $((seen + 3)) -a "$(drops two/net0 filtered)" = "$filtered"
in_guest two "ip addr add 10.9.0.99/24 dev eth0; ping -c 2 -W 1 -I 10.9.0.99 10.9.0.1" >/dev/null
check "an address that is not the guest's is held back" test "$(drops two/net0 foreignIP)" -gt 0
in_guest two "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ping -c 2 -W 1 10.9.0.1" >/dev/null
check "a hardware address that is not the guest's too" test "$(drops two/net0 foreignMAC)" -gt 0
vxctl metrics | grep -E '^vxd_device_drops_total.*[1-9]$' | sed 's/^/| /'

step "the end"
xl destroy one
check "xl shutdown" xl shutdown two
check "the guests are gone" wait_gone two 60
check "no tap is left" wait_until 30 sh -c "! ls /sys/class/net | grep -q '^vx'"
check "and nothing in the bridge" equal "$(ls /sys/class/net/br0/brif | wc -l)" 0
wait_until 20 equal_now guests 0
no_trace_left
