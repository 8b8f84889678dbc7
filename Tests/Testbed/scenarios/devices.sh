# limit: 700 s
# also on: trixie
# processors: 4
# An HVM guest without a disk, with console, network and entropy devices over virtio-mmio. Its profile declares them; where libxl knows
# such devices (4.18 and later, on trixie) the guest's configuration does, and the profile has their options.
load_modules llc stp bridge tun
brctl addbr br0
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
[ $RELEASE = bookworm ] && create=true || create=false
cat >/etc/vxd/profiles.json <<JSON
{"version": 1, "guests": [{"guest": "one", "devices": [
  {"type": "network", "create": $create, "bridge": "br0", "mac": "00:16:3e:00:00:01"},
  {"type": "console", "create": $create, "log": {"path": "/var/log/one-console.log", "timestamps": true}, "ports": [
    {"name": "vx.command", "pty": "/run/one.command"},
    {"name": "org.qemu.guest_agent.0", "pty": "/run/one.agent"},
    {"name": "vx.file", "pty": "/run/one.file"}, {"name": "vx.open"}]},
  {"type": "entropy", "create": $create}]}]}
JSON
run_vxd_unprivileged
start_vxd
check "vxctl checks the profiles" vxctl config check /etc/vxd/profiles.json
remember_resources
# net0, console0 and rng0; or net0, console1 and rng2, by their places.
$create && CONSOLE=console0 || CONSOLE=console1
$create || GUEST_VIRTIO="1 3 4"
write_config one "vx.test=serve"
grep '^virtio' /root/one.cfg | sed 's/^/| /'
step "a guest without a disk, whose devices are its profile's"
check "xl create" create one
check "it serves over its console port" wait_console one "GUEST SERVES" 300
vxctl list | sed 's/^/| /'
check "four named ports" in_guest one "[ \$(ls /dev/virtio-ports | wc -l) = 4 ]"
check "random numbers" in_guest one "grep -q virtio /sys/class/misc/hw_random/rng_current && dd if=/dev/hwrng of=/tmp/random bs=1024 count=4 2>/dev/null && [ \$(tr -d '\000' </tmp/random | wc -c) -gt 4000 ]"

step "the network"
check "an address" in_guest one "ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up"
for size in 0 1472 20000; do check "ping, $size bytes" ping -c 2 -W 5 -s $size 10.9.0.2; done
in_guest one "(seq 1 100000 | nc -l -p 5000) >/dev/null 2>&1 &"
# Its input stays open: at the end of that busybox's nc ends the connection.
mkfifo /tmp/open
exec 5<>/tmp/open
check "TCP from the guest" equal "$(nc 10.9.0.2 5000 <&5 | md5sum)" "$(seq 1 100000 | md5sum)"
exec 5>&-
check "vxctl link down" vxctl link one/net0 down
check "the guest sees it" wait_until 20 in_guest one "grep -q 0 /sys/class/net/eth0/carrier"
check "vxctl link up" vxctl link one/net0 up
check "and is reached again" wait_until 30 ping -c 1 -W 1 10.9.0.2

step "a login on the console"
in_guest one "echo \"operator:\$(mkpasswd secret):1000:1000::/tmp:/bin/sh\" >>/etc/passwd; (while :; do /bin/getty -L 0 hvc1 vt100; done) >/dev/null 2>&1 &"
mkfifo /tmp/keys
vxctl console one --size 132x43 </tmp/keys >/tmp/console.out 2>&1 &
console=$!
exec 9>/tmp/keys
asks() { wait_until 60 grep -q "$1" /tmp/console.out; }
check "the guest asks who it is" asks 'login:'
echo operator >&9
check "and for the password" asks 'Password:'
echo secret >&9
echo 'id -un; stty size' >&9
check "somebody is logged in, on a terminal of 132 columns and 43 rows" asks '43 132'
check "it is he" grep -q '^operator' /tmp/console.out
exec 9>&-
kill $console
sed 's/^/| /' /tmp/console.out
vxctl console one --read-only --seconds 1 >/tmp/watched.out 2>&1 </dev/null
check "who only watches sees what was before" grep -q '43 132' /tmp/watched.out
check "the log has it, with the time" grep -q '^20[0-9-]*T[0-9:.]*Z .*43 132' /var/log/one-console.log

step "qemu's guest agent"
in_guest one "qemu-ga -d -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -f /tmp/ga.pid -t /tmp"
exec 7<>/run/one.agent
echo '{"execute": "guest-ping"}' >&7
IFS= read -r -t 60 answer <&7
check "it answers a ping" equal "$answer" '{"return": {}}'
echo '{"execute": "guest-get-time"}' >&7
IFS= read -r -t 60 answer <&7
check "and tells the time" sh -c "echo '$answer' | grep -q '\"return\": [0-9]'"
exec 7>&-

step "who has a port open is seen on both sides"
guest_has_open() { vxctl show one/$CONSOLE --json | tr -d ' \n' | grep -o "{[^{}]*\"$1\"[^{}]*}" | grep -q "\"guestOpen\":$2"; }
host_has_open() { in_guest one "mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; grep -q 'host_connected: $1' /sys/kernel/debug/virtio-ports/vport*p4"; }
check "the guest's agent has its port open" guest_has_open org.qemu.guest_agent.0 true
in_guest one "kill \$(cat /tmp/ga.pid)"
check "and no more when it has ended" wait_until 20 guest_has_open org.qemu.guest_agent.0 false
check "an event says so" grep -q "one/$CONSOLE: device.ports: the guest has open: .*vx.command" $VXD_LOG
check "nobody has the other one" host_has_open 0
mkfifo /tmp/hold
vxctl console one vx.open </tmp/hold >/dev/null 2>&1 &
console=$!
exec 7>/tmp/hold
check "until somebody has, which the guest sees" wait_until 20 host_has_open 1
exec 7>&-
kill $console
check "and that he goes" wait_until 20 host_has_open 0

step "a file in both directions, while the console is flooded"
written=$(cat /var/log/one-console.log* | wc -c)
in_guest one "(while :; do dmesg; done) >/dev/hvc1 2>/dev/null &"
seq 1 60000 >/tmp/file
in_guest one "(head -c $(stat -c %s /tmp/file) </dev/virtio-ports/vx.file >/tmp/file; md5sum </tmp/file >/tmp/sum; cat /tmp/file >/dev/virtio-ports/vx.file) >/dev/null 2>&1 &"
exec 6<>/run/one.file
cat /tmp/file >&6
head -c "$(stat -c %s /tmp/file)" <&6 >/tmp/file.back &
reader=$!
check "it arrived in the guest as it was" wait_until 100 in_guest one "grep -q $(md5sum </tmp/file | cut -d' ' -f1) /tmp/sum"
check "and came back" wait_until 100 sh -c "! kill -0 $reader 2>/dev/null"
check "as it was" cmp /tmp/file /tmp/file.back
exec 6>&-
check "the console was written to meanwhile" test "$(cat /var/log/one-console.log* | wc -c)" -gt $((written + 5000))

step "kill -9 of vxd"
kill -9 "$(vxd_pid)"
wait "$(vxd_pid)" 2>/dev/null
start_vxd
check "all three are served again" wait_until 60 device_state_is one/$CONSOLE connected
check "the guest still serves" wait_until 60 in_guest one "true"
check "is reached" wait_until 30 ping -c 1 -W 1 10.9.0.2
check "and has random numbers" in_guest one "dd if=/dev/hwrng of=/dev/null bs=64 count=1"
check "the console remembers" sh -c "vxctl console one --read-only --seconds 1 </dev/null 2>/dev/null | grep -q 'Linux version\|console'"

step "the end"
check "xl destroy" xl destroy one
check "the guest is gone" wait_gone one 30
check "no tap is left" wait_until 30 sh -c "! ls /sys/class/net | grep -q '^vx'"
check "no socket is left" sh -c "! ls /run/vxd/console | grep -q sock"
wait_until 20 equal_now guests 0
no_trace_left
