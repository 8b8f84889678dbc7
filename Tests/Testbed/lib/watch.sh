# A machine's own limit is in its own time. Should that time stand still, it is ended from outside, and what its processors were at is kept.

# Seconds of real time without a word of the machine. Its clock speaks every two emulated seconds (watch_limit in dom0/lib.sh), which take some
# 10 s when all processors work and the clock is at its finest.
STALL=${VXD_TESTBED_STALL:-300}

watch_machine() { # FOLDER PID : until the process is gone
  local folder=$1 pid=$2 size=0 now silent=0
  while kill -0 "$pid" 2>/dev/null; do
    sleep 1
    now=$(stat -c %s "$folder/console.log" 2>/dev/null)
    if [ "$now" = "$size" ]; then silent=$((silent + 1)); else size=$now silent=0; fi
    [ $silent -ge $STALL ] || continue
    {
      echo "TESTBED STALLED: no word of the machine for $STALL s; its processors, twice:"
      ask_monitor "$folder" "info registers -a"
      ask_monitor "$folder" "info registers -a"
      ask_monitor "$folder" "info lapic" "info pic"
    } >"$folder/stalled.log" 2>&1
    kill "$pid"
    return
  done
}

ask_monitor() { # FOLDER COMMAND... : prints what QEMU's monitor answers
  python3 - "$@" <<'PYTHON'
import os, socket, sys
os.chdir(sys.argv[1])
monitor = socket.socket(socket.AF_UNIX)
monitor.settimeout(5)
monitor.connect("monitor")
for command in [""] + sys.argv[2:]:
    monitor.sendall(command.encode() + b"\n")
    answer = b""
    try:
        while answer.count(b"(qemu) ") < (2 if command == "" else 1):
            piece = monitor.recv(65536)
            if not piece:
                break
            answer += piece
    except TimeoutError:
        pass
    if command:
        print(answer.decode(errors="replace").replace("\r", ""))
PYTHON
}
