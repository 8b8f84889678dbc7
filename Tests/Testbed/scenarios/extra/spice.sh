# takes: 200 s
# limit: 1500 s
# in the gate: turn 2
# needs: spice
# processors: 4
# SPICE with Debian's own parts: a server in dom0 (Xorg with spiceqxl), its agent in an HVM guest, by a port of vxd's that is connected while the agent
# has it open, and a client without a window. The agent comes and goes, the clipboard goes both ways, and vxd dies in the middle of it.
load_modules crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft t10-pi scsi_common scsi_mod libata libahci ahci sd_mod \
  crc16 mbcache jbd2 crc32c_generic libcrc32c ext4
check "the disks are there" wait_until 20 test -b /dev/sdb
mkdir -p /debian /run/vxd
mount -t ext4 /dev/sda /debian
for folder in /proc /dev /run/vxd; do mkdir -p /debian$folder && mount -o bind $folder /debian$folder; done
mkdir -p /debian/spice
cp /spice/* /debian/spice/
cat >/etc/vxd/profiles.json <<'JSON'
{"version": 1, "guests": [{"guest": "one", "devices": [
  {"type": "console", "ports": [{"name": "vx.command", "pty": "/run/one.command"},
    {"name": "com.redhat.spice.0", "socket": {"connect": "/run/vxd/agent.sock", "whenOpen": true}}]}]}]}
JSON
start_vxd
check "vxctl checks the profiles" vxctl config check /etc/vxd/profiles.json
remember_resources

step "the server and a client"
(chroot /debian /usr/lib/xorg/Xorg -config /spice/xorg.conf -noreset -logfile /tmp/xorg.log :2 >/var/log/xen/xorg.log 2>&1 &)
check "the server listens for an agent" wait_until 60 test -S /run/vxd/agent.sock
mkfifo /tmp/offers
(chroot /debian /usr/bin/python3 /spice/client 5930 /spice <>/tmp/offers >/var/log/xen/client.log 2>&1 &)
EVENTS=/debian/spice/events
has_events() { test "$(grep -c "$2" $EVENTS 2>/dev/null)" -ge "$1"; } # COUNT PATTERN
check "the client is connected" wait_until 100 has_events 1 'channel opened'

step "a guest with the agent's X, and nobody at the port yet"
GUEST_MEMORY=400
write_config one "vx.test=serve" "$(disk xvde /dev/sdb)"
check "xl create" create one
check "it serves" wait_console one "GUEST SERVES .*com.redhat.spice.0" 300
in_guest one "mkdir /debian && mount -t ext4 /dev/vda /debian && for folder in /dev /proc /sys /tmp; do mount -o bind \$folder /debian\$folder; done; mkdir -p /debian/run/spice-vdagentd"
check "an X" in_guest one "(chroot /debian Xvfb :3 -screen 0 640x480x24 -nolisten tcp >/tmp/xvfb.log 2>&1 &); tries=0; until [ -S /tmp/.X11-unix/X3 ]; do tries=\$((tries + 1)); [ \$tries -lt 300 ] || exit 1; usleep 100000; done"
port_is() { vxctl show one/console0 --json | tr -d ' \n' | grep -o '{[^{}]*"com.redhat.spice.0"[^{}]*}' | grep "\"guestOpen\":$1" | grep -q "\"hostOpen\":$2"; }
check "the port is open on neither side" port_is false false
check "the client knows of no agent" not has_events 1 agent

step "the agent comes"
start_agent() {
  in_guest one "rm -f /debian/run/spice-vdagentd/*; (chroot /debian spice-vdagentd -f -x -X -u /dev/null >>/tmp/vdagentd.log 2>&1 & echo \$! >/tmp/vdagentd.pid); usleep 500000; (DISPLAY=:3 chroot /debian spice-vdagent -x >>/tmp/vdagent.log 2>&1 & echo \$! >/tmp/vdagent.pid)"
}
start_agent
check "agent-connected is true" wait_until 60 has_events 1 'agent connected'
check "the port is open on both sides" port_is true true

# 1 MiB each way; another one each time.
text() { seq "$1" 1000000 | head -c 1048576; }
sum() { md5sum | cut -d ' ' -f 1; }
guest_has() { in_guest one "DISPLAY=:3 timeout 20 chroot /debian xclip -o -selection clipboard 2>/dev/null | md5sum | grep -q $1"; }
to_guest() { # NUMBER : offered by the client, and read in the guest
  text "$1" >/debian/spice/offer
  wait_until 60 offered "$(sum </debian/spice/offer)"
}
# Offered again each time: what a client offers before it knows what a new agent can do is not sent.
offered() { echo /spice/offer >/tmp/offers && guest_has "$1"; }
copy_in_guest() { in_guest one "seq $1 1000000 | head -c 1048576 >/tmp/copied; DISPLAY=:3 chroot /debian xclip -i -selection clipboard /tmp/copied >/dev/null 2>&1; md5sum </tmp/copied"; }
to_client() { # NUMBER : copied in the guest, and got by the client
  copied=$(copy_in_guest "$1" | cut -d ' ' -f 1)
  [ -n "$copied" ] && wait_until 60 client_got "$copied"
}
client_got() { equal "$(sum </debian/spice/got)" "$1"; }
check "1 MiB of the client's clipboard is in the guest" to_guest 1
check "1 MiB of the guest's clipboard is at the client" to_client 2

step "the agent goes, and comes again"
in_guest one "kill -9 \$(cat /tmp/vdagentd.pid); kill -9 \$(cat /tmp/vdagent.pid)"
check "agent-connected is false" wait_until 60 has_events 1 'agent disconnected'
check "the port is open on neither side" port_is false false
start_agent
check "agent-connected is true again" wait_until 60 has_events 2 'agent connected'
check "and the clipboard is there" to_guest 3

kill_vxd() { # as a supervisor sees it: the process dies, and is started again
  kill -9 "$(vxd_pid)"
  wait "$(vxd_pid)" 2>/dev/null
  check "agent-connected is false meanwhile" wait_until 60 has_events "$1" 'agent disconnected'
  start_vxd
  check "and true with the next vxd" wait_until 60 has_events $(($1 + 1)) 'agent connected'
  check "the port is open on both sides" wait_until 20 port_is true true
}
step "kill -9 of vxd, while nothing is under way"
kill_vxd 2
check "1 MiB into the guest" to_guest 5
check "1 MiB out of it" to_client 6

step "kill -9 of vxd, in the middle of 1 MiB"
check "the port is slowed down" vxctl limit one/console0 --write-bytes 50000
moved() { test "$(device_field one/console0 writtenBytes)" -gt "$1"; }
before=$(device_field one/console0 writtenBytes)
copied=$(copy_in_guest 4 | cut -d ' ' -f 1)
check "it is under way" wait_until 60 moved $((before + 100000))
check "and not through" not client_got "$copied"
kill_vxd 3
check "1 MiB into the guest, by the new connection" to_guest 7
check "1 MiB out of it" to_client 8

step "the guest dies"
check "xl destroy" xl destroy one
check "agent-connected is false" wait_until 60 has_events 4 'agent disconnected'
check "the guest is gone" wait_gone one 30
sed 's/^/| /' $EVENTS
wait_until 20 equal_now guests 0
no_trace_left
