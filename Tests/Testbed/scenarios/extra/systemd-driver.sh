# takes: 200 s
# limit: 1500 s
# in the gate: turn 1
# needs: debian xenbus
# processors: 5
# The driver domain is an unprivileged PVH Debian 12 with systemd, on a disk of its own, and vxd comes as its package: restart, watchdog and
# upgrade under the I/O of a guest, and a reboot of the driver domain.
MAY_REBOOT=3
rounds_more() { wait_until 200 has_rounds one $(($(rounds_of one) + $1)) && ! console_says one CORRUPT; }
create_debian() {
  write_driver_config pvh /guest/debian.cpio quiet 512 restart
  echo 'disk = [ "phy:/dev/sdb,xvda,w" ]' >>/root/driver.cfg
  create driver
}
# Its console is in the log of its name, whichever number it has: a reboot begins a new one.
up_again() { [ "$(xl domid driver 2>/dev/null)" != "$1" ] && [ -n "$(xl domid driver 2>/dev/null)" ] && xenstore-exists "/local/domain/$(xl domid driver)/data/command"; }

step "a driver domain that is a Debian with systemd"
# vxctl for dom0, which has no device of its own to serve.
check "the package is installed in dom0" apt-get install -y -q /packages/vxd_*.deb
check "and its service is switched off there" systemctl disable --now vxd.service vxd.socket
check "xl create" create_debian
check "it is up" wait_console driver "DRIVER UP" 300
in_driver "systemctl --no-pager --failed" | sed 's/^/| /'
check "it is an ordinary domain" in_driver "[ \"\$(cat /proc/xen/capabilities 2>/dev/null)\" != control_d ] && [ \"\$(xenstore-read domid)\" != 0 ]"
check "apt installs the package" in_driver "apt-get install -y -q /packages/vxd_*.deb 2>&1 | tail -n 5"
check "the service runs" in_driver "wait_until 300 vxd_answers; systemctl is-active vxd.service"
in_driver "mkdir -p /srv/disks; truncate -s 64M /srv/disks/one.img"

step "a guest whose disk is the driver domain's"
write_direct_config pvh one "vx.test=xenbus" "$(driver_disk xvda /srv/disks/one.img)"
check "xl create of the guest" create one
check "the guest writes and verifies" wait_until 300 has_rounds one 2
in_driver "vxctl list" | sed 's/^/| /'

step "restart, watchdog and upgrade under I/O"
check "systemctl restart" in_driver "systemctl restart vxd.service && wait_until 300 vxd_answers"
check "the data is right" rounds_more 2
check "systemd ends a vxd that stands still, and starts another" in_driver \
  "pid=\$(systemctl show -p MainPID --value vxd.service); kill -STOP \$pid; wait_until 900 sh -c \"! kill -0 \$pid 2>/dev/null\" && wait_until 300 vxd_answers"
check "the journal says why" in_driver "journalctl --no-pager -u vxd.service | grep -q -i 'watchdog timeout'"
check "the data is right after it" rounds_more 2
check "the packages' next version is installed" in_driver "apt-get install -y -q /packages/next.deb 2>&1 | tail -n 5; wait_until 300 vxd_answers"
check "it is the next version" in_driver "dpkg-query -W -f='\${Version}' vxd | grep 'next\$'"
check "the data is right with it" rounds_more 2
check "the journal has the lines of the guest by its name" in_driver "journalctl --no-pager -u vxd.service GUEST=domain-$(xl domid one) | grep xvda"

step "the driver domain reboots"
before=$(xl domid driver)
check "xl reboot" xl reboot driver
check "it comes up again as another domain" wait_until 400 up_again "$before"
check "vxd was started by its boot" in_driver "wait_until 600 vxd_answers; systemctl is-active vxd.service"
vxctl reattach --backend driver >/tmp/reattach.out 2>&1
sed 's/^/| /' /tmp/reattach.out
check "vxctl reattach" grep -q ': connected$' /tmp/reattach.out
check "the guest's data is right, without a reboot of the guest" rounds_more 3

step "the end"
xl destroy one
check "the guest is gone" wait_gone one 60
check "the driver domain's vxd serves nobody" in_driver "wait_until 300 sh -c '! vxctl list | grep -q xvda'"
check "the package is purged there" in_driver "apt-get purge -y -q vxd 2>&1 | tail -n 5"
xl destroy driver
check "the driver domain is gone" wait_gone driver 60
