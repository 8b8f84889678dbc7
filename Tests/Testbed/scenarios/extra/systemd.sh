# takes: 160 s
# limit: 1200 s
# needs: debian xenbus
# processors: 4
# dom0 is a Debian 12 with systemd and Debian's own Xen toolstack, and vxd comes as its package: notification, socket activation, watchdog,
# journal, the unit's sandbox with every type of device, restart and upgrade under I/O, removal.
unit() { systemctl show -p "$1" --value vxd.service; }
unit_is() { equal "$(unit "$1")" "$2"; }
vxd_pid() { unit MainPID; }
serves() { vxctl status --json >/dev/null && unit_is ActiveState active; }
another_pid() { [ "$(vxd_pid)" != "$1" ] && [ "$(vxd_pid)" != 0 ]; }
connected() { [ "$(vxctl list one | grep -c connected)" = "$1" ]; }
rounds_more() { wait_until 60 has_rounds one $(($(rounds_of one) + $1)) && ! console_says one 'GUEST FAIL\|CORRUPT'; }
journal() { journalctl --no-pager -o cat -u vxd.service "$@"; }

step "Debian with systemd"
check "systemd is the init" equal "$(cat /proc/1/comm)" systemd
check "xenstored is a service of Debian's" systemctl is-active xen.service
systemctl --no-pager --failed | sed 's/^/| /'
xl list | sed 's/^/| /'

step "installation"
check "apt installs the package" apt-get install -y -q /packages/vxd_*.deb
check "the service runs, as it told systemd itself" wait_until 30 serves
check "by Type=notify" unit_is Type notify
unit StatusText | sed 's/^/| /'
check "as a user of its own" equal "$(ps -o user= -p "$(vxd_pid)")" vxd
check "with the two capabilities of its unit and no others" equal "$(sed -n 's/^CapEff:\t//p' "/proc/$(vxd_pid)/status")" 0000000000001002
check "after xenstored, at a boot too" sh -c 'systemctl show -p After --value vxd.service | tr " " "\n" | grep -qx xen.service'
systemd-analyze security --no-pager vxd.service | tail -n 1 | sed 's/^/| /'
check "systemd rates its exposure at 4 or less of 10" sh -c \
  "systemd-analyze security --no-pager vxd.service | sed -n 's/.*exposure level for vxd.service: \([0-9.]*\).*/\1/p' | awk '{exit !(\$1 > 0 && \$1 <= 4)}'"

step "socket activation"
check "the service is stopped" systemctl stop vxd.service
check "a client starts it" wait_until 30 serves

step "a guest with every type of device"
make_disk /srv/disks/one.img 64
make_disk /srv/disks/two.img 64
# Modules that are loaded when the service has long been running: what the sandbox allows must not depend on that.
modprobe -a loop tun macvtap dummy bridge
losetup /dev/loop0 /srv/disks/two.img
ip link add br0 type bridge
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
[ -e /sys/class/net/dummy0 ] || ip link add dummy0 type dummy
ip link add link dummy0 name mv0 type macvtap
ip link set dummy0 up
ip link set mv0 up
cat >/etc/vxd/profiles.json <<JSON
{"version": 1, "guests": [{"guest": "one", "devices": [
  {"type": "network", "bridge": "br0", "mac": "00:16:3e:00:00:01"},
  {"type": "network", "macvtap": "mv0", "mac": "$(cat /sys/class/net/mv0/address)"},
  {"type": "console", "log": {"path": "/var/log/vxd/one.log"}, "ports": [{"name": "vx.command", "pty": "/run/vxd/one.command"}]},
  {"type": "entropy"}]}]}
JSON
check "systemctl reload" systemctl reload vxd.service
check "the profiles hold" vxctl config check /etc/vxd/profiles.json
write_config one "vx.test=crash vx.disks=2" "$(disk xvde /srv/disks/one.img)" "$(disk xvdf /dev/loop0)"
sed -i 's,/etc/vxd/slots.aml,/usr/share/vxd/slots.aml,' /root/one.cfg
check "xl create" create one
check "the guest writes and verifies" wait_until 300 has_rounds one 2
vxctl list | sed 's/^/| /'
check "six devices are served in the sandbox" connected 6

step "the journal"
check "lines of a guest are found by its name" sh -c "journalctl --no-pager -u vxd.service GUEST=one | grep -q xvde"
check "and no others" sh -c "! journalctl --no-pager -o json -u vxd.service GUEST=one | grep -v '\"GUEST\":\"one\"' | grep -q ."

step "restart under I/O"
pid=$(vxd_pid)
check "systemctl restart" systemctl restart vxd.service
check "another process serves" another_pid "$pid"
check "the guest's devices are connected" wait_until 30 connected 6
check "and its data is right" rounds_more 2

step "the watchdog"
pid=$(vxd_pid)
kill -STOP "$pid"
check "systemd ends a vxd that stands still, and starts another" wait_until 120 another_pid "$pid"
check "it says why" sh -c "journalctl --no-pager -u vxd.service | grep -q -i 'watchdog timeout'"
check "the guest's devices are connected again" wait_until 30 connected 6
check "and its data is right again" rounds_more 2

step "upgrade by apt under I/O"
pid=$(vxd_pid)
check "the packages' next version is installed" apt-get install -y -q /packages/next.deb
check "another process serves after it" another_pid "$pid"
check "the next version" sh -c "dpkg-query -W -f='\${Version}' vxd | grep -q 'next\$'"
check "the operator's profiles are as they were" grep -q mv0 /etc/vxd/profiles.json
check "the devices are connected after it" wait_until 30 connected 6
check "and the data is right after it" rounds_more 2
check "removing vxd under a running guest is refused" not apt-get remove -y -q vxd

step "the end"
check "xl shutdown" xl shutdown one
check "the guest is gone" wait_gone one 120
check "the guest is content" guest_says_nothing_bad one
check "no tap is left" sh -c '! ls /sys/class/net | grep -q ^vx'
check "systemd counts no failure but the watchdog's" test "$(unit NRestarts)" -le 2
check "the package is purged" apt-get purge -y -q vxd
check "no unit and no socket is left" sh -c '! systemctl is-active vxd.service vxd.socket && ! ls /run/vxd 2>/dev/null'
