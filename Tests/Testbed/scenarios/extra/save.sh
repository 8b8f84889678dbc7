# takes: 150 s
# limit: 1500 s
# in the gate: turn 2
# also on: trixie
# xl save and xl restore of HVM guests with devices of all types, on both buses. Linux resets its devices before it is saved, by which nothing of theirs
# has to be carried; a guest that knows nothing of Xen does not, and its devices stand still behind a restore.
load_modules llc stp bridge tun
brctl addbr br0
ip addr add 10.9.0.1/24 dev br0
ip link set br0 up
for name in mmio pci plain; do make_disk /disks/$name.img 64; done
devices='[{"type": "network", "bridge": "br0"}, {"type": "console", "log": {"path": "/var/log/second-console.log"}}, {"type": "entropy"}]'
printf '{"version": 1, "guests": [{"guest": "m*", "devices": %s}, {"guest": "p*", "transport": "pci", "devices": %s}]}\n' "$devices" "$devices" \
  >/etc/vxd/profiles.json
start_vxd

begin() { # NAME WORDS
  step "$1: created"
  write_config "$1" "$2 vx.test=save" "$(disk xvde /disks/$1.img)"
  # A guest without Xen's drivers has no console of Xen's.
  case $2 in *xen_nopv*) echo "serial = \"file:$(console_of "$1")\"" >>"/root/$1.cfg" ;; esac
  check "xl create" create "$1"
  check "it does I/O" wait_console "$1" "GUEST ROUND 2" 300
}
lines() { grep -c '^second' /var/log/second-console.log; }
more_lines() { test "$(lines)" -gt "$1"; }
restored() { # NAME
  rm -f "/root/$1.save"
  check "it goes on with its files" wait_until 120 has_rounds "$1" $((before + 3))
  check "its network device works" ping -c 2 -W 5 10.9.0.2
  seen=$(lines)
  check "its console and its random numbers too" wait_until 30 more_lines "$seen"
  check "its console says what it should" sh -c "tail -n 1 /var/log/second-console.log | grep -q ', 64 random bytes'"
  for device in xvde net0 console0 rng0; do check "$device is connected" device_state_is "$1/$device" connected; done
  check "nothing bad" guest_says_nothing_bad "$1"
}
remember_resources
for bus in mmio pci; do
  begin $bus vx.bus=$bus
  step "$bus: saved and restored"
  check "explain says that it can be saved" sh -c "vxctl explain $bus | grep 'note xl save and xl restore keep'"
  check "xl save" xl save $bus /root/$bus.save
  check "the guest is gone" domain_gone $bus
  no_trace_left
  before=$(rounds_of $bus)
  check "xl restore" xl restore /root/$bus.save
  restored $bus
  step "$bus: a checkpoint, behind which it goes on"
  before=$(rounds_of $bus)
  check "xl save -c" xl save -c $bus /root/$bus.save
  restored $bus
  check "xl destroy" xl destroy $bus
  check "it is gone" wait_gone $bus 30
done

begin plain "vx.bus=pci xen_nopv console=ttyS0"
step "a guest without Xen's drivers: saved and restored"
check "doctor warns" sh -c "vxctl doctor | grep 'plain.*xl save and xl migrate lose the state'"
check "xl save" xl save plain /root/plain.save
check "the guest is gone" domain_gone plain
no_trace_left
before=$(sha256sum </disks/plain.img)
check "xl restore" xl restore /root/plain.save
# Longer than its driver waits for an answer; idle time costs nothing here.
sleep 60
check "its driver is not taken for one that works" device_state_is plain/xvde ready
check "nothing of it has been answered" equal "$(device_field plain/xvde requests)" 0
check "explain names the device" sh -c "vxctl explain plain | grep 'BAD.*plain/.*driver has not connected'"
check "nothing is written to its disk" equal "$(sha256sum </disks/plain.img)" "$before"
check "xl destroy" xl destroy plain
check "it is gone" wait_gone plain 30
no_trace_left
stop_vxd
