// Counts the stores of the calling thread into some memory, one by one, and keeps what the memory was behind one of them: what a process
// that is killed there leaves behind. By page protection and single steps, on x86-64.
#pragma once
#include <stddef.h>
#include <stdint.h>

/// Whether this works here.
int cstoretrace_works(void);
/// Begins to count stores into two areas of whole pages.
///
/// - `stop`: behind this store, counted from 1, both areas are copied to `copy`, one after the other; 0 for none.
void cstoretrace_begin(void *first, size_t first_length, void *second, size_t second_length, uint64_t stop, void *copy);
/// Ends it; the number of stores.
uint64_t cstoretrace_end(void);
