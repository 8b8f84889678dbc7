# A Debian 12 with what SPICE is made of, for scenarios that say "# needs: spice": the server with its X, the agent with another, and a client.
# It is a file system that is made once and cached; dom0 has one snapshot of it as /dev/sda and another one, for its guest, as /dev/sdb.

SPICE_PACKAGES="xserver-xspice python3-gi gir1.2-spiceclientglib-2.0 spice-vdagent xvfb xclip"

needs_spice() { [ -n "$1" ] && grep -q '^# needs: .*spice' "$1"; }

prepare_spice() { # sets SPICE, the image
  local key root lock
  key=$( (echo "$SPICE_PACKAGES"; declare -f begin_tree in_tree end_tree prepare_spice) | sha256sum | cut -c1-16)
  SPICE=$CACHE/spice-$key/root.img
  [ ! -e "$SPICE" ] || { touch "${SPICE%/*}"; return 0; }
  exec {lock}>"$CACHE/debian-lock"
  flock --timeout 1800 "$lock" || die "another testbed has been making a Debian disk for half an hour"
  [ -e "$SPICE" ] || {
    find "$CACHE" -maxdepth 1 -name 'spice-*' -type d -mtime +3 -exec rm -rf {} +
    say "making the disk of a Debian with SPICE's server, agent and client (once)"
    begin_tree "${SPICE%/*}" "$SPICE_PACKAGES"
    end_tree
    mkfs.ext4 -q -q -F -d "$root" "$SPICE.part" 2000M && mv "$SPICE.part" "$SPICE" || { drop_tree "$root"; die "cannot write $SPICE (is the disk full?)"; }
    drop_tree "$root"
  }
  exec {lock}>&-
}

# For dom0's initial RAM disk: what finds the disks, and what the scenario runs there.
add_spice() { # FOLDER
  install -D -m 644 -t "$1/spice" "$TESTBED"/spice/*
  copy_modules "$1" crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft t10-pi scsi_common scsi_mod libata libahci ahci sd_mod \
    crc16 mbcache jbd2 crc32c_generic libcrc32c ext4
}
