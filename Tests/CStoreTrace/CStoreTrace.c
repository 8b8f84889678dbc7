#define _GNU_SOURCE
#include "CStoreTrace.h"

#if defined(__x86_64__)
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define TRAP_FLAG 0x100

// One thread traces at a time: the test that does is serialized.
static struct {
  char *area[2];
  size_t length[2];
  uint64_t count, stop;
  char *copy;
  volatile pid_t thread;
  int stepping;
  struct sigaction segv, trap;
} trace;

static void protect(int access) {
  for (int index = 0; index < 2; index++) mprotect(trace.area[index], trace.length[index], access);
}

static int is_traced(const char *address) {
  for (int index = 0; index < 2; index++)
    if (address >= trace.area[index] && address < trace.area[index] + trace.length[index]) return 1;
  return 0;
}

static void on_fault(int number, siginfo_t *info, void *context) {
  if (gettid() != trace.thread || !is_traced(info->si_addr)) {
    // Somebody's real fault: it comes once more, with the handler of before.
    sigaction(number, &trace.segv, NULL);
    return;
  }
  protect(PROT_READ | PROT_WRITE);
  trace.stepping = 1;
  ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_step(int number, siginfo_t *info, void *context) {
  (void)info;
  if (gettid() != trace.thread || !trace.stepping) {
    sigaction(number, &trace.trap, NULL);
    return;
  }
  trace.stepping = 0;
  ((ucontext_t *)context)->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
  if (++trace.count == trace.stop) {
    memcpy(trace.copy, trace.area[0], trace.length[0]);
    memcpy(trace.copy + trace.length[0], trace.area[1], trace.length[1]);
  }
  protect(PROT_READ);
}

int cstoretrace_works(void) { return 1; }

void cstoretrace_begin(void *first, size_t first_length, void *second, size_t second_length, uint64_t stop, void *copy) {
  trace.area[0] = first;
  trace.length[0] = first_length;
  trace.area[1] = second;
  trace.length[1] = second_length;
  trace.count = 0;
  trace.stop = stop;
  trace.copy = copy;
  trace.stepping = 0;
  struct sigaction action = {.sa_flags = SA_SIGINFO};
  action.sa_sigaction = on_fault;
  sigaction(SIGSEGV, &action, &trace.segv);
  action.sa_sigaction = on_step;
  sigaction(SIGTRAP, &action, &trace.trap);
  trace.thread = gettid();
  protect(PROT_READ);
}

uint64_t cstoretrace_end(void) {
  protect(PROT_READ | PROT_WRITE);
  trace.thread = 0;
  sigaction(SIGSEGV, &trace.segv, NULL);
  sigaction(SIGTRAP, &trace.trap, NULL);
  return trace.count;
}
#else
int cstoretrace_works(void) { return 0; }
void cstoretrace_begin(void *first, size_t first_length, void *second, size_t second_length, uint64_t stop, void *copy) {
  (void)first, (void)first_length, (void)second, (void)second_length, (void)stop, (void)copy;
}
uint64_t cstoretrace_end(void) { return 0; }
#endif
