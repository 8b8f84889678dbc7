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
#include <xencall.h>
#include <xen/xen.h>
#include <xen/memory.h>
#include <xen/hvm/dm_op.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>

/// Reads a parameter of an HVM guest (xen: public/hvm/params.h). -1 with errno where that is refused.
static inline int cxen_hvm_parameter(xencall_handle *call, domid_t domain, uint32_t index, uint64_t *value) {
  struct xen_hvm_param *parameter = (struct xen_hvm_param *)xencall_alloc_buffer(call, sizeof(*parameter));
  if (!parameter) return -1;
  *parameter = (struct xen_hvm_param){.domid = domain, .index = index};
  int result = xencall2(call, __HYPERVISOR_hvm_op, HVMOP_get_param, (uint64_t)(uintptr_t)parameter);
  if (result >= 0) *value = parameter->value;
  xencall_free_buffer(call, parameter);
  return result;
}
