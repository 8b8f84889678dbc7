# vxd: `make demo` shows it, `make test` proves it. Both install what they need (Debian 12, as root).

SHELL := /bin/bash
# Paths of the machine are no part of what is built: the same sources give the same bits anywhere.
PREFIX_MAP := -Xswiftc -file-prefix-map -Xswiftc $(CURDIR)=. -Xcc -ffile-prefix-map=$(CURDIR)=.
# The build id is a digest of the debug information too, which is not shipped and not the same each time.
SWIFT_RELEASE := -c release --static-swift-stdlib $(PREFIX_MAP) -Xlinker --build-id=none
# The Debian release that 'make deb' builds for; others than this machine's in a tree of that release, in folders of their own.
RELEASE ?= bookworm
VXD_BUILD ?= .build$(if $(filter-out bookworm,$(RELEASE)),/$(RELEASE))
VXD_DEB ?= build/deb$(if $(filter-out bookworm,$(RELEASE)),-$(RELEASE))
TESTBED := Tests/Testbed/testbed

.PHONY: help deps arm64 test-arm64 test-long test-all api man build unit asan tsan fuzz fuzz-coverage profile testbed shell test demo bench compare format lint clean install install-files deb deb-programs deb-files appliance

help:
	@echo 'make demo     boot Xen under QEMU, serve a disk to a guest, show it'
	@echo 'make test     everything: format, warnings, unit tests, real Xen scenarios'
	@echo 'make test-all that, the scenarios that it leaves out this time (make test-long), and those on Xen for Arm (make test-arm64)'
	@echo 'make unit     the fast lane: unit tests only'
	@echo 'make testbed  the scenarios on real Xen only (SCENARIO=name for one; make shell for a console)'
	@echo 'make asan     the unit tests under AddressSanitizer; make tsan under ThreadSanitizer'
	@echo 'make fuzz     coverage-guided fuzzing of fourteen targets (SECONDS=n each, two at a time; TARGET=name for one; KEEP=1 keeps what is found)'
	@echo 'make fuzz-coverage  which lines of each parser the kept inputs reach; below 90 % fails (TARGET=name for one; SHOW=1 lists the others)'
	@echo 'make profile  instructions, allocations and reference counting per request (callgrind), compared with Benchmarks/counts (KEEP=1 writes it)'
	@echo 'make bench    ratios of the block backend to bare libaio'
	@echo 'make compare  vxd beside blkback and netback under emulated Xen, by instructions (PART=block, network or hvm)'
	@echo 'make build    release binaries in .build/release'
	@echo 'make arm64    vxd and vxctl for arm64 in .build/arm64, cross-built from packages'
	@echo 'make deb      Debian packages vxd and virtio-xenbus-dkms, in build/deb; RELEASE=trixie those for Debian 13, in build/deb-trixie'
	@echo 'make appliance  a driver domain without a disk, as one kernel and one initial RAM disk, in build/appliance'
	@echo 'make install  the same files below DESTDIR (default /)'

# The scenarios that the gate leaves out this time, those on Xen for Arm, and all that there is.
test-long: build deb appliance
	$(TESTBED) run $$($(TESTBED) list left)

test-arm64: arm64
	deploy/build/install-dependencies qemu-system-arm gcc-aarch64-linux-gnu bison flex
	$(TESTBED) run $$($(TESTBED) list arm64)

test-all: test test-long test-arm64

deps:
	@deploy/build/install-dependencies

build: deps
	swift package resolve
	deploy/build/check-dependencies
	swift build $(SWIFT_RELEASE) --product vxd
	swift build $(SWIFT_RELEASE) --product vxctl

# For arm64, on x86-64: in .build/arm64.
arm64: deps
	swift package resolve
	deploy/build/check-dependencies
	deploy/build/arm64

# The control socket's description, generated from the code; a test compares them.
api: deps
	swift build --product vxd
	.build/debug/vxd --describe-api > deploy/control-api.json

# docs/profiles.md has its tables from the code (a test compares them), and vxd-profiles(5) is that document (Tests/check-documents compares).
man: deps
	swift build --product vxd
	.build/debug/vxd --describe-options | deploy/man/update-options docs/profiles.md
	deploy/man/from-markdown vxd-profiles 5 'options of disks, guests and their devices' <docs/profiles.md >deploy/man/vxd-profiles.5

lint: deps
	Tests/lint

format:
	swift format --in-place --recursive Package.swift Sources Tests Benchmarks

unit: deps
	Tests/run-unit-tests

asan: deps
	Tests/run-unit-tests address

tsan: deps
	Tests/run-unit-tests thread

SECONDS ?= 60
fuzz: deps
	Tests/Fuzz/run $(SECONDS) $(TARGET)

fuzz-coverage: deps
	Tests/Fuzz/coverage $(TARGET)

profile:
	@deploy/build/install-dependencies valgrind
	swift build $(SWIFT_RELEASE) --product vxd-bench
	Benchmarks/profile .build/release/vxd-bench $(if $(KEEP),--keep)

# Scenarios in a Debian with systemd install the packages.
testbed: build deb appliance
	$(TESTBED) run $(SCENARIO)

shell: build
	$(TESTBED) shell

test: deps
	Tests/gate

demo: build
	$(TESTBED) demo

bench: deps
	swift build $(SWIFT_RELEASE) --product vxd-bench
	.build/release/vxd-bench
	.build/release/vxd-bench rates

compare: build
	Benchmarks/compare/run $(PART)

DESTDIR ?= /
# Debian 12's debhelper looks for units in /lib; from Debian 13 on, packages have nothing there.
UNITS ?= $(if $(filter bookworm,$(RELEASE)),/lib,/usr/lib)/systemd/system
install: build install-files

install-files:
	install -D -s -m 755 $(VXD_BUILD)/release/vxd $(DESTDIR)/usr/sbin/vxd
	install -D -s -m 755 $(VXD_BUILD)/release/vxctl $(DESTDIR)/usr/bin/vxctl
	deploy/build/clear-digests $(DESTDIR)/usr/sbin/vxd $(DESTDIR)/usr/bin/vxctl
	install -D -m 644 deploy/vxd.service $(DESTDIR)$(UNITS)/vxd.service
	install -D -m 644 deploy/vxd.socket $(DESTDIR)$(UNITS)/vxd.socket
	install -D -m 644 deploy/sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/vxd.conf
	install -D -m 644 deploy/tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/vxd.conf
	install -D -m 644 deploy/sysctl.conf $(DESTDIR)/usr/lib/sysctl.d/50-vxd.conf
	install -D -m 644 deploy/man/vxd.8 $(DESTDIR)/usr/share/man/man8/vxd.8
	install -D -m 644 deploy/man/vxctl.1 $(DESTDIR)/usr/share/man/man1/vxctl.1
	install -D -m 644 deploy/man/vxd-profiles.5 $(DESTDIR)/usr/share/man/man5/vxd-profiles.5
	install -d $(DESTDIR)/usr/share/doc/vxd/docs
	install -m 644 README.md CHANGELOG.md SECURITY.md $(DESTDIR)/usr/share/doc/vxd/
	install -m 644 docs/*.md $(DESTDIR)/usr/share/doc/vxd/docs/
	install -D -m 644 deploy/grafana/vxd.json $(DESTDIR)/usr/share/vxd/grafana.json
	install -D -m 644 deploy/prometheus/alerts.yml $(DESTDIR)/usr/share/vxd/alerts.yml
	install -D -m 644 deploy/control-api.json $(DESTDIR)/usr/share/vxd/control-api.json
	install -d $(DESTDIR)/usr/share/bash-completion/completions $(DESTDIR)/usr/share/zsh/vendor-completions \
	  $(DESTDIR)/usr/share/fish/vendor_completions.d
	$(VXD_BUILD)/release/vxctl --generate-completion-script bash | sed '1{/^#!/d}' > $(DESTDIR)/usr/share/bash-completion/completions/vxctl
	$(VXD_BUILD)/release/vxctl --generate-completion-script zsh > $(DESTDIR)/usr/share/zsh/vendor-completions/_vxctl
	$(VXD_BUILD)/release/vxctl --generate-completion-script fish > $(DESTDIR)/usr/share/fish/vendor_completions.d/vxctl.fish
	install -D -m 644 deploy/modules-load.conf $(DESTDIR)/usr/lib/modules-load.d/vxd.conf
	install -D -m 644 deploy/acpi/slots.aml $(DESTDIR)/usr/share/vxd/slots.aml
	install -D -m 644 deploy/acpi/slots.asl $(DESTDIR)/usr/share/vxd/slots.asl
	install -d $(DESTDIR)/usr/src/virtio-xenbus-1.0
	install -m 644 deploy/guest-module/* $(DESTDIR)/usr/src/virtio-xenbus-1.0/
	install -D -m 644 deploy/profiles.example.json $(DESTDIR)/usr/share/vxd/profiles.example.json

# Packs, checks with lintian; Tests/check-packages tries the packages in a chroot.
ifeq ($(RELEASE),bookworm)
deb: build
	@deploy/build/install-dependencies debhelper dh-dkms lintian
	$(MAKE) deb-files
else
deb: deps
	swift package --scratch-path $(VXD_BUILD) resolve
	deploy/build/check-dependencies $(VXD_BUILD)
	deploy/build/in-release $(RELEASE) $(MAKE) deb-programs deb-files RELEASE=$(RELEASE)
endif

# The two halves, where the compiler and the libraries of the release are: in its tree, for another release than this machine's.
deb-programs:
	swift build --scratch-path $(VXD_BUILD) --disable-automatic-resolution $(SWIFT_RELEASE) --product vxd
	swift build --scratch-path $(VXD_BUILD) --disable-automatic-resolution $(SWIFT_RELEASE) --product vxctl

deb-files:
	RELEASE=$(RELEASE) VXD_BUILD=$(VXD_BUILD) VXD_DEB=$(VXD_DEB) deploy/debian/build
	lintian --fail-on error --suppress-tags bad-distribution-in-changes-file $(VXD_DEB)/*.deb

# A driver domain that is all in memory (docs/appliance.md). Of what 'make build' has made, and Debian's kernel.
appliance: build
	@deploy/build/install-dependencies lz4
	deploy/appliance/build

clean:
	rm -rf .build build
