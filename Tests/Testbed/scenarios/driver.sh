# takes: 200 s
# limit: 1200 s
# needs: xenbus
# processors: 5
# dom0 with the toolstack alone, an unprivileged driver domain with vxd, a PVH and a PV guest with disks from it over Xenbus.
no_errors() { ! grep -E "GUEST (ERRORS|CORRUPT|FAIL)|Oops|BUG:|hung task" "$(console_of "$1")"; }
no_corruption() { ! grep -E "GUEST (CORRUPT|FAIL)|Oops|BUG:" "$(console_of "$1")"; }

step "a driver domain: an ordinary PVH guest with driver_domain=1"
check "it comes up with vxd" create_driver_domain pvh
check "its privcmd is locked: it has no rights over guests" console_says driver "privcmd N\|privcmd none"
BEFORE=$(in_driver resources)
echo "| $BEFORE"
step "a PVH and a PV guest, by the stock xl: backend=driver, specification=virtio"
write_direct_config pvh one "vx.test=xenbus" "$(driver_disk xvda /disks/a.img)"
write_direct_config pv two "vx.test=xenbus" "$(driver_disk xvda /dev/loop0)"
check "xl creates the PVH guest" create one
check "xl creates the PV guest" create two
for guest in one two; do
  check "$guest: the stock virtio_blk finds the disk; its ring is large: event index on, indirect descriptors off" \
    wait_console $guest "GUEST DISK vda .*features=............................01" 200
done
in_driver vxctl list | sed 's/^/| /'
for guest in one two; do
  check "$guest: the driver can be unbound and bound under I/O" wait_console $guest "GUEST BACK unbind" 200
  check "$guest: and unloaded and loaded" wait_console $guest "GUEST BACK rmmod" 200
  check "$guest: verified rounds" rounds_more $guest 1
done

step "what a request costs"
ONE=$(xl domid one)
first=$(in_driver costs "domain-$ONE/xvda")
rounds_more one 2
second=$(in_driver costs "domain-$ONE/xvda")
echo "| requests, notifications, interrupts, mapping calls: before $first; after $second"
# Each request is announced by one notification and answered by one interrupt at most. How many share one depends on who runs when: with a
# processor for each side it is half of them, on one processor that they share it may be none. 16: what may be under way at either look.
check "at most one notification and one interrupt a request" \
  sh -c "set -- $first $second; [ \$5 -gt \$1 ] && [ \$((\$6 - \$2)) -le \$((\$5 - \$1 + 16)) ] && [ \$((\$7 - \$3)) -le \$((\$5 - \$1 + 16)) ]"
check "and no mapping call" sh -c "set -- $first $second; [ \$8 = \$4 ]"

step "hot-plug"
check "vxctl attach: the guest takes the disk" vxctl attach one disk --backend driver --image /disks/c.img --device xvdb
check "/dev/vdb is there and at work" wait_until 100 last_round_has one vdb
check "vxctl detach under I/O" sh -c "vxctl detach one/xvdb --xenbus --deadline 60 | grep -q 'detached$'"
rounds_more one 2
check "/dev/vdb is gone" not last_round_has one vdb
check "its entries are gone" not xenstore-exists "/libxl/$ONE/device/virtio_disk/51728"
check "a bad image is refused and leaves nothing" \
  sh -c "vxctl attach one disk --backend driver --image /disks/none.img --device xvdc 2>&1 | grep -q 'No such file' && ! xenstore-exists /libxl/$ONE/device/virtio_disk/51744"

step "kill -9 of vxd under verified I/O"
in_driver "kill_vxd; start_vxd"
check "PVH guest: verified rounds go on" rounds_more one 2
check "PV guest: verified rounds go on" rounds_more two 2
check "neither guest saw an error" sh -c "! grep -E 'GUEST (ERRORS vda|CORRUPT|FAIL)' $(console_of one) $(console_of two)"

step "save and restore under I/O"
check "xl save" xl save two /root/two.save
check "xl restore" xl restore /root/two.save
rm -f /root/two.save
check "verified rounds go on" rounds_more two 2
check "no error" no_errors two

step "a guest is destroyed under I/O, and created again at once"
check "xl destroy" xl destroy one
check "no zombie" wait_gone one 30
check "xl creates it again" create one
# Its own test of binding is over then: a driver that is bound while there is no backend stays unbound.
check "verified rounds" wait_console one "GUEST ROUND 1" 300

step "the driver domain is lost, and comes again under another number"
check "xl destroy" xl destroy driver
check "a new one comes up, a PV guest this time" create_driver_domain pv
vxctl reattach --backend driver >/tmp/reattach.out 2>&1
sed 's/^/| /' /tmp/reattach.out
check "vxctl reattach" equal "$(grep -c ': connected$' /tmp/reattach.out)" 2
for guest in one two; do
  check "$guest: verified rounds on the same disk name, without a reboot" rounds_more $guest 3
  check "$guest: the last round had no error" sh -c "grep -E 'GUEST (ROUND|ERRORS)' $(console_of $guest) | tail -n 1 | grep -q 'ROUND.*vda'"
  check "$guest: no data was wrong" no_corruption $guest
done

step "a frontend that lies: as if the PV guest had written it"
TWO=$(xl domid two)
FRONT=/local/domain/$TWO/device/virtio_disk/51712
BACK=/local/domain/$(xl domid driver)/backend/virtio_disk/$TWO/51712
for text in "" "1" "1 -1 00" "2 99999999 00" "3 0 zz" "4 0 000000000000000000000000"; do xenstore-write "$FRONT/vx-cfgw" "$text"; done
rounds_more two 1
check "garbage in its configuration writes harms nobody" no_corruption two
offer=$(xenstore-read "$BACK/vx-offer")
new_life() { [ "$(xenstore-read "$BACK/vx-offer")" != "$offer" ] && [ "$(xenstore-read "$BACK/state")" = 4 ]; }
# A number: Linux's xenbus_switch_state never again writes over a state that it cannot read as one.
xenstore-write "$FRONT/state" 77
check "a state that is none is a reset, and the guest's module begins a new life" wait_until 100 new_life
check "its neighbour goes on" rounds_more one 1

step "the end"
xl destroy one
xl destroy two
check "no domain but dom0 and the driver domain, and no zombie" wait_until 30 sh -c "[ \$(xl list | wc -l) = 3 ]"
check "nothing is left in the driver domain" wait_until 60 sh -c ". /testbed-lib.sh; [ \"\$(in_driver resources)\" = '$BEFORE' ]"
check "no entry is left" not xenstore-exists "/local/domain/$(xl domid driver)/backend/virtio_disk/$ONE"
