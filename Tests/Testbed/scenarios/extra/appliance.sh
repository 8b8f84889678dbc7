# takes: 330 s
# limit: 1500 s
# needs: debian xenbus appliance
# processors: 5
# in the gate: turn 0
# The appliance by its shipped configuration, beside a Debian as a driver domain: how soon either serves, 16 disks and 4 networks in its memory,
# control, metrics and log from dom0, a kill of vxd in it, and the next appliance in its place.
now() { awk '{print int($1 * 100)}' /proc/uptime; }
in_seconds() { awk "BEGIN {print $1 / 100}"; }
answers() { vxctl status --domain "$1" >/dev/null 2>&1; }
rounds_more() { wait_until 200 has_rounds "$1" $(($(rounds_of "$1") + $2)) && ! console_says "$1" CORRUPT; }
# Until vxd in a new domain answers dom0, in hundredths of a second.
serves_after() { # NAME
  begun=$(now)
  create "$1" || return
  created=$(now)
  POLL=50000 wait_until 200 answers "$1" || return
  served=$(now)
  echo "| $1: xl create took $(in_seconds $((created - begun))) s, vxd answers $(in_seconds $((served - begun))) s after it began"
  TOOK=$((served - begun))
}
# As it is shipped, but for its name, what it adds for the kernel's own report of its memory, and its disks.
appliance() { # NAME DISKS
  sed "s/^name = .*/name = \"$1\"/; s/^extra = \"/&sysrq_always_enabled /" /usr/lib/vxd-appliance/vxd-appliance.cfg >"/root/$1.cfg"
  printf 'tsc_mode = "native"\ndisk = [ %s ]\n' "$2" >>"/root/$1.cfg"
}
MEMORY=$(sed -n 's/^memory = //p' /usr/lib/vxd-appliance/vxd-appliance.cfg)
memory_report() { # what the kernel says of its memory, on its console
  xl sysrq storage 7 && xl sysrq storage m && xl sysrq storage 4
  usleep 1000000
  grep -E 'Node 0 active_anon|pages RAM|pages reserved|Normal free|DMA32 free|DMA free|slab_unreclaimable|free:[0-9]' "$(console_of storage)" | tail -n 12 | cut -c 1-220 | sed 's/^/| /'
}

step "vxctl in dom0, and what the appliance serves"
check "the package is installed in dom0" apt-get install -y -q /packages/vxd_*.deb
check "and its service is switched off there" systemctl disable --now vxd.service vxd.socket
mkdir -p /disks/srv
for number in $(seq 16); do truncate -s 16M "/disks/srv/$number.img"; done
truncate -s 400M /disks/storage.img
truncate -s 16M /disks/raw.img
check "a file system with 16 images" mkfs.ext4 -q -F -m 0 -d /disks/srv /disks/storage.img
printf '{"version": 1, "disks": [{"device": "xvdb", "limits": {"writeOps": 1234}}]}\n' >/root/profiles.json
check "its configuration" vxctl appliance-config /root/storage-config.img --profiles /root/profiles.json --bridge br0= --mount xvda=/srv
CONFIG='"format=raw, vdev=xvdz, access=ro, target=/root/storage-config.img"'

step "how soon a Debian serves as a driver domain"
write_driver_config pvh /guest/debian.cpio quiet 512 destroy
echo 'disk = [ "phy:/dev/sdb,xvda,w" ]' >>/root/driver.cfg
check "it is created" create driver
check "it is up" wait_console driver "DRIVER UP" 300
check "vxd is installed in it" in_driver "apt-get install -y -q /packages/vxd_*.deb 2>&1 | tail -n 1; wait_until 300 vxd_answers; sync"
check "dom0 reaches it there too" answers driver
check "it is shut down" xl shutdown driver
check "and gone" wait_gone driver 100
check "it serves again after a start of its own" serves_after driver
DEBIAN=$TOOK
xl destroy driver
check "it is gone" wait_gone driver 30

step "the appliance, by its shipped configuration"
appliance storage "\"format=raw, vdev=xvda, access=rw, target=/disks/storage.img\", \"format=raw, vdev=xvdb, access=rw, target=/disks/raw.img\", $CONFIG"
check "it serves" serves_after storage
sed 's/^/| /' "$(console_of storage)" | grep -v ACPI
check "that is sooner than the Debian: $(in_seconds "$TOOK") s (xl create: $(in_seconds $((created - begun))) s), and $(in_seconds "$DEBIAN") s" test "$TOOK" -lt "$DEBIAN"
memory_report

step "16 disks and 4 networks: a guest at work on one, and two that have the others"
disks() { # FIRST LAST : of the appliance's images, from xvda on
  for number in $(seq "$1" "$2"); do
    vdev=xvd$(echo abcdefghijklmnop | cut -c $((number - $1 + 1)))
    printf '"format=raw, vdev=%s, access=rw, backend=storage, backendtype=standalone, specification=virtio, target=/srv/%s.img",' "$vdev" "$number"
  done
}
write_direct_config pvh one "vx.test=xenbus" "\"format=raw, vdev=xvda, access=rw, backend=storage, backendtype=standalone, specification=virtio, target=/dev/xvdb\""
GUEST_MEMORY=300
write_direct_config pvh two "vx.test=serve" "$(disks 1 8)"
write_direct_config pvh three "vx.test=serve" "$(disks 9 15)"
check "xl create of guest one" create one
check "one writes and verifies" wait_console one "GUEST ROUND 1 vda" 300
for guest in two three; do
  check "xl create of guest $guest" create $guest
  check "$guest: a console" vxctl attach $guest console --backend storage --options "{\"ports\": [{\"name\": \"vx.command\", \"pty\": \"/run/$guest.command\"}]}"
  for number in 1 2; do
    check "$guest: a network" vxctl attach $guest network --backend storage --options '{"bridge": "br0"}'
  done
done
vxctl list --domain storage | cut -c 1-120 | sed 's/^/| /'
check "16 disks, 4 networks and 2 consoles are connected" equal "$(vxctl list --domain storage | grep -c ' connected ')" 22
ONE=$(xl domid one)
check "the profile is in force" sh -c "vxctl show --domain storage $(xl domid two)/xvdb --json | tr -d ' \n' | grep -q '\"writeOps\":1234'"
memory_report

step "control, metrics and log from dom0"
check "vxctl metrics" sh -c "vxctl metrics --domain storage | grep -q 'vxd_device_in_flight.*xvda'"
check "a limit is set" vxctl limit --domain storage "$ONE/xvda" --write-ops 5000
check "and told" sh -c "vxctl limit --domain storage $ONE/xvda | grep -q 5000"
check "events come" sh -c "vxctl events --domain storage --count 3 --after 0 | grep -q domain-"
check "its log is its console's" grep -q "info .*xvda" "$(console_of storage)"
check "no client has left anything" equal "$(xenstore-list "/local/domain/$(xl domid storage)/vxd/control" | wc -l)" 0

step "kill -9 of all that runs in it but init, under I/O"
pid() { vxctl status --domain storage | sed -n 's/.*pid \([0-9]*\).*/\1/p'; }
before=$(pid)
check "it is killed" xl sysrq storage i
another() { after=$(pid) && [ -n "$after" ] && [ "$after" != "$before" ]; }
check "init has started another one" wait_until 60 another
check "the data is right" rounds_more one 2
check "and there was no error" sh -c "! grep -h -E 'GUEST (ERRORS|CORRUPT|FAIL)' $(console_of one)"
check "all devices are there again" wait_until 60 sh -c "[ \$(vxctl list --domain storage | grep -c ' connected ') = 22 ]"

step "with 16 MiB less than it is shipped with"
less=$((MEMORY - 16))
check "xl mem-set" xl mem-set storage $less
check "it gives them back" wait_until 40 memory_is_at_most storage $less
check "and serves" rounds_more one 2
check "and answers" vxctl status --domain storage
check "no process was killed because memory ran out" not console_says storage "Out of memory\|oom-kill"
memory_report
xl destroy two
xl destroy three

step "the next appliance in its place"
appliance storage2 "$CONFIG"
check "it is there before the old one goes" serves_after storage2
begun=$(now)
check "the old one goes" xl destroy storage
check "its disk is the new one's" xl block-attach storage2 "format=raw, vdev=xvdb, access=rw, target=/disks/raw.img"
vxctl reattach --backend storage2 one >/tmp/reattach.out 2>&1
sed 's/^/| /' /tmp/reattach.out
check "vxctl reattach" grep -q 'xvda: connected$' /tmp/reattach.out
echo "| the guest's disk was away for $(in_seconds $(($(now) - begun))) s"
check "the guest's data is right, without a reboot of it" rounds_more one 3
check "the last round had no error" sh -c "grep -E 'GUEST (ROUND|ERRORS)' $(console_of one) | tail -n 1 | grep -q 'ROUND.*vda'"

step "the end"
xl destroy one
check "the guest is gone" wait_gone one 60
check "xl shutdown is followed" xl shutdown storage2
check "the appliance is gone" wait_gone storage2 60
