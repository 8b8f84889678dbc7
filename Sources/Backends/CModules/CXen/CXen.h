// The libxen libraries with a stable interface. libxenctrl is not among them: its interface changes with each release.
#pragma once
#include <stdint.h>
#include <stdbool.h>
#include <stddef.h>
#include <xendevicemodel.h>
#include <xenevtchn.h>
#include <xenforeignmemory.h>
#include <xengnttab.h>
#include <xenstore.h>
#include <xen/memory.h>
#include <xen/hvm/dm_op.h>
