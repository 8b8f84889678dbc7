# Runs scenarios, two machines beside each other or as many as are asked for, and reports.
#
# A run is named SCENARIO[@RELEASE][~VARIATION]. Its folder below $OUTPUT keeps console.log (all that the machine said), checks.log (what is shown of
# it), and logs.tar.gz (dom0's and the guests' logs) when a check failed.

scenario_of() { local name=${1%%[@~]*}; echo "$TESTBED/scenarios/$name.sh"; }
release_of() { local name=${1%%~*}; case $name in *@*) echo "${name#*@}" ;; *) echo bookworm ;; esac; }
variation_of() { case $1 in *~*) echo "${1##*~}" ;; *) echo 0 ;; esac; }
# "# KEY: VALUE" among a scenario's first lines.
header() { # FILE KEY DEFAULT
  local value
  value=$(sed -n "/^# $2: /{s/^# $2: \([^ ]*\).*/\1/p;q}; /^[^#]/q" "$1")
  echo "${value:-$3}"
}

# The names of scenarios, those first that take longest ("# takes: SECONDS"): what the gate runs now, or "left", what it leaves out, or "arm64", those on
# Arm, since a build of vxd for Arm is not on every machine that tests. The gate runs a scenario with "# in the gate: turn N", N from 0 to 3, in each fourth
# landing, and on another release two landings later: when the number in Tests/Testbed/turn, to which each landing adds 1, leaves N behind a division by 4.
scenario_names() { # [left|arm64]
  local what=${1:-} file name release turn now
  now=${VXD_TESTBED_TURN:-$(cat "$TESTBED/turn")}
  case $now in '' | *[!0-9]*) die "$TESTBED/turn: expected a number, not '$now'" ;; esac
  for file in "$TESTBED"/scenarios/*.sh "$TESTBED"/scenarios/extra/*.sh; do
    name=${file#"$TESTBED"/scenarios/}
    name=${name%.sh}
    turn=$(sed -n 's/^# in the gate: turn //p' "$file")
    for release in "" $(sed -n 's/^# also on: //p' "$file"); do
      case $what:$release in
        arm64:arm64) ;;
        arm64:* | *:arm64) continue ;;
        left:*) ! runs_now "$turn" "$release" "$now" || continue ;;
        *) runs_now "$turn" "$release" "$now" || continue ;;
      esac
      echo "$(header "$file" takes 60) $name${release:+@$release}"
    done
  done | LC_ALL=C sort -k 1,1nr -k 2,2 | cut -d ' ' -f 2
}

runs_now() { # TURN RELEASE NUMBER : whether the gate runs what has this turn, or none
  local later=${2:+2}
  [ -z "$1" ] || [ $((($1 + ${later:-0}) % 4)) = $((10#$3 % 4)) ]
}

check_names() { # NAME... : that each is there, and has a release that the testbed knows
  local name file
  for name; do
    file=$(scenario_of "$name")
    [ -e "$file" ] || die "unknown scenario '${name%%[@~]*}'; expected one of: $(cd "$TESTBED/scenarios" && find . -name '*.sh' | sed 's,^\./,,; s,\.sh$,,' | sort | tr '\n' ' ')"
    case $(release_of "$name") in bookworm | trixie | arm64) ;; *) die "unknown release in '$name'; expected bookworm, trixie or arm64" ;; esac
    case $(variation_of "$name") in *[!0-9]* | '') die "variation in '$name': expected a number" ;; esac
  done
}

# A queue is a folder with a file for each run that is still to be taken.
make_queue() { # FOLDER NAME...
  local queue=$1 name number=1000 release
  shift
  check_names "$@"
  rm -rf "$queue"
  mkdir -p "$queue/waiting" "$queue/taken" "$queue/done"
  for name; do
    release=$(release_of "$name")
    [ -e "$queue/images-$release" ] || { prepare "$release" && printf '%s\n%s\n' "$IMAGES" "$PACKAGES_ROOT" >"$queue/images-$release"; }
    ! needs_debian "$(scenario_of "$name")" || {
      check_debs
      { read -r IMAGES; read -r PACKAGES_ROOT; } <"$queue/images-$release"
      prepare_debian
    }
    ! needs_stock "$(scenario_of "$name")" || {
      { read -r IMAGES; read -r PACKAGES_ROOT; } <"$queue/images-$release"
      RELEASE=$release
      prepare_stock
    }
    ! needs_spice "$(scenario_of "$name")" || prepare_spice
    number=$((number + 1))
    echo "$name" >"$queue/waiting/$number"
  done
}

take() { # QUEUE : prints a name and takes it; false when none is left
  local file
  for file in "$1"/waiting/*; do
    # Another worker may have been quicker.
    mv "$file" "$1/taken/" 2>/dev/null && cat "$1/taken/${file##*/}" && return
  done
  return 1
}

work() { # QUEUE : runs what is in the queue until nothing is left
  local name verdict
  while name=$(take "$1"); do
    { read -r IMAGES; read -r PACKAGES_ROOT; } <"$1/images-$(release_of "$name")"
    run_scenario "$name"
    verdict=$?
    echo "$verdict $SCENARIO_VERDICT" >"$1/done/${name//\//:}"
    [ $verdict -eq 0 ] || [ -z "${TESTBED_STOP:-}" ] || rm -f "$1"/waiting/*
  done
}

report() { # QUEUE : true when every check of every run held
  local file name code words passed=0 failed=0 failures=
  for file in "$1"/done/*; do
    [ -e "$file" ] || continue
    name=${file##*/}
    name=${name//:/\/}
    read -r code words <"$file"
    printf '  %-28s %s\n' "$name" "$words"
    if [ "$code" = 0 ]; then
      passed=$((passed + 1))
    else
      failed=$((failed + 1)) failures+=" '$name'"
      # A reader who has the last page of the output only finds here what it was.
      grep '^not ok' "$OUTPUT/$name/checks.log" 2>/dev/null | sed 's/^/    /'
    fi
  done
  local left
  left=$(find "$1/waiting" "$1/taken" -type f | wc -l)
  left=$((left - passed - failed))
  [ $left -eq 0 ] || { echo "  $left not run to an end"; failed=$((failed + left)); }
  [ -z "$failures" ] || echo "  to run what failed as it was: Tests/Testbed/testbed run$failures"
  printf 'scenarios: %s passed, %s failed\n' $passed $failed
  # Nothing that ran is nothing that holds.
  [ $failed -eq 0 ] && [ $passed -gt 0 ]
}

run() { # JOBS NAME...
  local jobs=$1 job queue workers=()
  shift
  # Two runs of one scenario would write over each other's files.
  mkdir -p "$OUTPUT"
  exec {RUN_LOCK}>"$OUTPUT/lock"
  flock --nonblock "$RUN_LOCK" || die "another testbed uses $OUTPUT: wait for it, or set VXD_TESTBED_OUTPUT to another folder"
  queue=$OUTPUT/queue-$$
  [ $# -le 1 ] && jobs=1
  make_queue "$queue" "$@"
  STREAM=no
  if [ "$jobs" = 1 ]; then
    STREAM=yes
    work "$queue"
  else
    for job in $(seq "$jobs"); do
      work "$queue" &
      workers+=($!)
    done
    # shellcheck disable=SC2064
    trap "kill ${workers[*]}; exit 1" TERM INT
    wait "${workers[@]}"
    trap - TERM INT
  fi
  report "$queue"
  local code=$?
  rm -rf "$queue"
  return $code
}

# What a run shows of its console.
shown() { sed -u 's|\r*$||' | tee "$1/console.log" | grep --line-buffered -E '^(STEP|ok - |not ok - |    |TESTBED |\| |GUEST|LOG|logs: )'; }

# A machine that died before its scenario began has tried nothing of ours (see the pitfalls in ARCHITECTURE.md): it is started again, and the
# report says so.
run_scenario() { # NAME : true when every check of it held; sets SCENARIO_VERDICT
  local try code
  for try in 1 2 3; do
    run_once "$1"
    code=$?
    [ $code -ne 0 ] && ! grep -qE '^(STEP|CLOCK|ok - |not ok - )' "$OUTPUT/$1/console.log" || break
    cp "$OUTPUT/$1/console.log" "$OUTPUT/$1/boot-$try.txt"
    [ "$try" = 3 ] || say "scenario $1: the machine died before it began ($OUTPUT/$1/boot-$try.txt); again"
  done
  [ "$try" = 1 ] || SCENARIO_VERDICT+=", after $((try - 1)) machines that died as they booted"
  return $code
}

run_once() { # NAME : true when every check of it held; sets SCENARIO_VERDICT
  local name=$1 file folder started machine watcher reader verdict
  file=$(scenario_of "$name")
  folder=$OUTPUT/$name
  RELEASE=$(release_of "$name")
  choose_binaries "$RELEASE"
  choose_variation "$(variation_of "$name")"
  MACHINE_CPUS=$(header "$file" processors 4)
  DOM0_CPUS=$(header "$file" "dom0 processors" 2)
  PARALLEL=$(header "$file" parallel no)
  LIMIT=$(header "$file" limit 420)
  PLUGIN=
  ! needs_compare "$file" || PLUGIN=$IMAGES/counts.so
  mkdir -p "$folder"
  rm -f "$folder"/*.log "$folder/logs.tar.gz" "$folder/console.fifo"
  DISK=
  ! needs_debian "$file" || { prepare_debian; DISK=$DEBIAN_IMAGE; }
  STOCK=
  ! needs_stock "$file" || prepare_stock
  SPICE=
  ! needs_spice "$file" || prepare_spice
  prepare_initrd "$file" "$folder"
  started=$SECONDS
  say "scenario $name begins (console in $folder/console.log)"
  mkfifo "$folder/console.fifo"
  if [ "${STREAM:-no}" = yes ]; then
    shown "$folder" <"$folder/console.fifo" | tee "$folder/checks.log" &
  else
    shown "$folder" <"$folder/console.fifo" >"$folder/checks.log" &
  fi
  reader=$!
  (boot "$INITRD" "$folder") </dev/null >"$folder/console.fifo" 2>&1 &
  machine=$!
  watch_machine "$folder" $machine &
  watcher=$!
  trap 'kill $machine $watcher; exit 1' TERM INT
  wait $machine 2>/dev/null
  trap - TERM INT
  wait $reader $watcher 2>/dev/null
  [ ! -s "$folder/stalled.log" ] || cat "$folder/stalled.log" >>"$folder/console.log"
  rm -f "$folder/initrd" "$folder/overlay.cpio" "$folder/console.fifo" "$folder/monitor"
  [ -s "$folder/logs.tar.gz" ] || rm -f "$folder/logs.tar.gz"
  verdict=$(sed -n 's/^TESTBED VERDICT //p' "$folder/console.log" | head -n 1)
  SCENARIO_VERDICT="${verdict:-no verdict} in $((SECONDS - started)) s"
  exec {screen}>>"$OUTPUT/screen"
  flock "$screen"
  [ "${STREAM:-no}" = yes ] || sed '/^LOG/,$d' "$folder/checks.log"
  case $verdict in
    "0 passed, 0 failed") SCENARIO_VERDICT="made no check, in $((SECONDS - started)) s" ;;
    *", 0 failed") ;;
    '') tail -n 60 "$folder/console.log" ;;
    *) [ "${STREAM:-no}" = yes ] || sed -n '/^LOG/,$p' "$folder/console.log" | tail -n 400 ;;
  esac
  say "scenario $name: $SCENARIO_VERDICT"
  exec {screen}>&-
  case $verdict in "0 passed, 0 failed") return 1 ;; *", 0 failed") return 0 ;; *) return 1 ;; esac
}
