#pragma once
/* Makes the linker keep this object file. */
int cthreadsanitizer_present(void);
