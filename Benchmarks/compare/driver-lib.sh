# What a driver domain does in place of hotplug scripts; sourced behind the testbed's own.

# Sees to the one device of a kind that comes next.
plug() { # vbd | vif
  domain=/local/domain/$(xenstore-read domid)
  until path=$(entry_of "$1"); do usleep 20000; done
  case $1 in
    vbd) XENBUS_PATH=$path /compare/hotplug-block add ;;
    vif)
      vif=vif$(echo "$path" | awk -F / '{print $(NF - 1) "." $NF}')
      until [ -e "/sys/class/net/$vif" ]; do usleep 20000; done
      XENBUS_PATH=$path vif=$vif /compare/hotplug-vif online
      ;;
  esac
}

# The path of a backend that is there and not plugged in yet.
entry_of() {
  for guest in $(xenstore-list "$domain/backend/$1" 2>/dev/null); do
    for device in $(xenstore-list "$domain/backend/$1/$guest"); do
      path=backend/$1/$guest/$device
      [ "$(xenstore-read "$path/state")" = 2 ] && ! xenstore-read "$path/hotplug-status" >/dev/null 2>&1 && echo "$path" && return
    done
  done
  return 1
}
