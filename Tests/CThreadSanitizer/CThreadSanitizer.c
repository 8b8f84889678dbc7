/* Synchronization.Mutex takes and gives a lock that is not contended by atomics in our own code, which ThreadSanitizer sees. A
 * contended one it takes and gives in the standard library and the kernel, which it does not: every such lock would be reported
 * as a race. These two functions stand in front of the library's and tell it. Nothing is suppressed. */
#include "CThreadSanitizer.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/socket.h>

extern void __tsan_acquire(void *address);
extern void __tsan_release(void *address);
extern void *dlsym(void *, const char *);

typedef __attribute__((swiftcall)) void (*lock_function)(uint32_t, __attribute__((swift_context)) void *);
typedef __attribute__((swiftcall)) void (*unlock_function)(__attribute__((swift_context)) void *);

/* The library's function behind ours; looked up by whichever thread comes first, or by several. */
static void *next(void *_Atomic *known, const char *name) {
  void *found = atomic_load_explicit(known, memory_order_acquire);
  if (!found) {
    found = dlsym((void *)-1l /* RTLD_NEXT */, name);
    atomic_store_explicit(known, found, memory_order_release);
  }
  return found;
}

__attribute__((swiftcall)) void mutex_lock_slow(uint32_t thread, __attribute__((swift_context)) void *handle)
    __asm__("$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF");
__attribute__((swiftcall)) void mutex_lock_slow(uint32_t thread, __attribute__((swift_context)) void *handle) {
  static void *_Atomic known;
  lock_function original = (lock_function)next(&known, "$s15Synchronization12_MutexHandleV9_lockSlowyys6UInt32VF");
  original(thread, handle);
  __tsan_acquire(handle);
}

__attribute__((swiftcall)) void mutex_unlock_slow(__attribute__((swift_context)) void *handle)
    __asm__("$s15Synchronization12_MutexHandleV11_unlockSlowyyF");
__attribute__((swiftcall)) void mutex_unlock_slow(__attribute__((swift_context)) void *handle) {
  static void *_Atomic known;
  unlock_function original = (unlock_function)next(&known, "$s15Synchronization12_MutexHandleV11_unlockSlowyyF");
  __tsan_release(handle);
  original(handle);
}

/* libxenstore cancels its reader thread within `read`, and ThreadSanitizer does not live through that. A shut-down connection makes
 * the reader end by itself before; it says so by -1 in the handle's first field, the connection's descriptor. */
struct xs_handle {
  volatile int descriptor;
};

void xs_close(struct xs_handle *handle) {
  static void *_Atomic known;
  void (*original)(struct xs_handle *) = (void (*)(struct xs_handle *))next(&known, "xs_close");
  if (handle) {
    shutdown(handle->descriptor, SHUT_RDWR);
    for (int turns = 0; turns < 1000000 && (handle->descriptor != -1 || turns < 10000); turns++) sched_yield();
  }
  original(handle);
}
#endif
#endif

int cthreadsanitizer_present(void) { return 1; }
