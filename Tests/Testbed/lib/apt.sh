# An apt of our own for what this machine does not have: another release's packages, and sources. The machine's own configuration and lists
# stay as they are, and its sources say where Debian's archives are.

# Where this machine gets a Debian archive from: the first source of it that apt knows.
archive() { # main | security
  local pattern='^[^ ]*/debian/* '
  [ "$1" = main ] || pattern='^[^ ]*/debian-security/* '
  apt-get indextargets --format '$(REPO_URI) $(CODENAME)' "Created-By: Packages" 2>/dev/null | grep -m 1 "$pattern" | cut -d ' ' -f 1
}

# Sets APT, options for apt-get and apt-cache. STATE is a folder of ours; TYPES deb or deb-src. The lists are as new as those of a machine that
# is updated every day. ARCHITECTURE: of the packages, where it is not this machine's.
own_apt() { # STATE RELEASE TYPES [ARCHITECTURE]
  local state=$1 release=$2 types=$3 architecture=${4:-} main security
  APT="-qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$state/parts -o Dir::Etc::main=/dev/null -o Dir::Etc::parts=$state/none
    -o Dir::State=$state -o Dir::State::status=$state/status -o Dir::Cache=$state -o APT::Install-Recommends=false -o APT::Sandbox::User=root"
  [ -z "$architecture" ] || APT+=" -o APT::Architecture=$architecture -o APT::Architectures::=$architecture"
  mkdir -p "$state/parts" "$state/none" "$state/lists/partial"
  [ -e "$state/status" ] || : >"$state/status"
  main=$(archive main)
  [ -n "$main" ] || die "apt knows no Debian archive: run 'apt-get update' on Debian 12 (bookworm) first"
  security=$(archive security)
  {
    source_entry "$types" "$main" "$release $release-updates"
    [ -z "$security" ] || source_entry "$types" "$security" "$release-security"
  } >"$state/parts/debian.sources.part"
  cmp -s "$state/parts/debian.sources.part" "$state/parts/debian.sources" || rm -f "$state/updated"
  mv "$state/parts/debian.sources.part" "$state/parts/debian.sources"
  [ -z "$(find "$state/updated" -mtime -1 2>/dev/null)" ] || return 0
  # shellcheck disable=SC2086
  apt-get $APT update >"$state/apt.log" 2>&1 || die "the package lists of $release cannot be read: $(grep -m 1 '^[EW]:' "$state/apt.log")"
  touch "$state/updated"
}

source_entry() { # TYPES URI SUITES
  printf 'Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n' "$1" "$2" "$3"
}
