/* Preloaded into a process: its wall clock is AHEAD seconds wrong, its counting clocks and all waits are untouched.
   (libfaketime 0.9.10 bends absolute waits as well, so that Python's time.sleep fails.) Needs no headers of libc. */
struct timespec { long seconds, nanoseconds; };
void *dlsym(void *handle, const char *symbol);

int clock_gettime(int clock, struct timespec *now) {
  static int (*real)(int, struct timespec *);
  if (!real) real = (int (*)(int, struct timespec *))dlsym((void *)-1L, "clock_gettime"); /* RTLD_NEXT */
  int failed = real(clock, now);
  if (!failed && (clock == 0 || clock == 5)) now->seconds += AHEAD; /* CLOCK_REALTIME, and its coarse sister */
  return failed;
}
