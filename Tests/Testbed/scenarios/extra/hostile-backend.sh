# takes: 200 s
# limit: 1800 s
# in the gate: turn 0
# needs: xenbus
# processors: 5
# A guest with a disk of an honest backend, in a driver domain, and one device after another of a backend in dom0 that lies
# (dom0/hostile-backend.c): the guest stays up, its other disk goes on, and what lied is gone from the guest afterwards.
rounds_more() { # NAME COUNT : so many rounds from now
  wait_until 200 has_rounds "$1" $(($(rounds_of "$1") + $2)) || { tail -n 20 "$(console_of "$1")"; return 1; }
}
last_round_has() { grep 'GUEST ROUND' "$(console_of one)" | tail -n 1 | grep -q "$1"; }
stays_up() { ! grep -v "grant_table: WARNING: g.e." "$(console_of one)" | grep -E "GUEST FAIL|Oops|BUG:|WARNING:|hung task|soft lockup|Call Trace|Out of memory"; }

# Runs a backend of a mode while the guest does two rounds, and until it ends.
meet() { # MODE KIND SECONDS WHAT
  echo "GUEST meets $1" >>"$(console_of one)"
  hostile-backend "$ONE" "$2" "${DEVICE:-51728}" "$1" "$3" >"/tmp/hostile-$1.out" 2>&1 &
  liar=$!
  check "$1: $4: the other disk goes on meanwhile" rounds_more one 2
  wait $liar
  sed 's/^/| /' "/tmp/hostile-$1.out"
  check "$1: nothing of it is left in the guest, and the other disk goes on" wait_until 100 last_round_has "disks vda \. devices 1 "
  check "$1: the guest is well" stays_up
}
lied() { grep -q "[1-9][0-9]* lies" "/tmp/hostile-$1.out"; }
said() { sed -n "/GUEST meets $1\$/,/GUEST meets/p" "$(console_of one)" | grep -q "$2"; }

check "a driver domain comes up with vxd" create_driver_domain pv
write_direct_config pv one "vx.test=hostile" "$(driver_disk xvda /disks/a.img)"
check "xl creates the guest" create one
check "verified rounds" wait_console one "GUEST ROUND 2" 200
ONE=$(xl domid one)

step "a backend that keeps the rules"
meet honest virtio_disk 0.5 "a disk of zeros"
check "its disk can be read" said honest "GUEST PROBE vdb read 0"
check "it cannot map the rings for writing" grep -q "^RINGS cannot be written" /tmp/hostile-honest.out

step "what it sees"
meet look virtio_disk 0.5 "looks for old memory"
check "it saw requests, and nothing of the guest's old memory" grep -q "lies, 0 secrets" /tmp/hostile-look.out
meet nostatus virtio_disk 0.5 "answers without a status, and without data"
check "it lied" lied nostatus
check "that is an error, not a success" said nostatus "GUEST PROBE vdb failed"

step "used rings"
for mode in badid nothead longlen jump back mute; do
  meet $mode virtio_disk 0.5 "a lie in the used ring, or no answer"
  check "it lied" lied $mode
done

step "events, and everything at once"
meet storm virtio_disk 0.5 "events without end"
meet stormidx virtio_disk 0.5 "events without end, and used indices"
meet scribble virtio_disk 0.5 "noise in all that it can write"
meet keep virtio_disk 0.5 "keeps its mappings and goes on writing"
for mode in storm stormidx scribble keep; do check "$mode: it lied" lied $mode; done

step "Xenstore"
meet wrongtype virtio_disk 3 "a disk that is a console"
check "it is not taken" grep -q "^not taken" /tmp/hostile-wrongtype.out
meet wrongtype virtio 3 "a device that nobody allowed"
check "it is not taken" grep -q "^not taken" /tmp/hostile-wrongtype.out
meet oldrings virtio_disk 3 "wants to write to descriptor tables"
check "it is not taken" grep -q "^not taken" /tmp/hostile-oldrings.out
meet greedy virtio_disk 5 "wants memory and queues"
meet garbage virtio_disk 5 "garbage in its nodes"
meet flap virtio_disk 5 "states without sense"
meet reset virtio_disk 0.5 "wants a reset"
meet honest virtio_disk 0.5 "after all that a disk works"
check "its disk can be read" said honest "GUEST PROBE vdb read 0"

step "the end"
grep -E "virtio|xenbus|vx" "$(console_of one)" | grep -v "GUEST" | sort | uniq -c | sort -rn | head -n 30 | sed 's/^/| /'
xl destroy one
check "no zombie" wait_gone one 30
