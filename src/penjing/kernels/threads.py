"""Rows of a kernel on several threads: a pool in C, whose threads spin for a moment before they sleep."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from penjing.errors import ArtifactError
from penjing.kernels import building
from penjing.kernels.instruction_sets import INSTRUCTION_SETS

SOURCE = """
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <unistd.h>

#define MOST 64
#define SPINS 1000000  /* somewhat less than a millisecond */

typedef void (*rows_function)(void **, int32_t, int32_t);

static struct { rows_function f; void **a; int32_t rows, parts; } job;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int32_t round_number, remaining, workers, first_seen[MOST];

static pid_t owner;

/* A forked process has the pool's memory and none of its threads. */
static void begin_anew(void) {
  pthread_mutex_t free_lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t nobody = PTHREAD_COND_INITIALIZER;
  lock = free_lock, callers = free_lock, wake = nobody;
  workers = remaining = 0;
}

static void part(int32_t i) {
  int64_t rows = job.rows;
  int32_t begin = (int32_t)(rows * i / job.parts), end = (int32_t)(rows * (i + 1) / job.parts);
  if (begin < end) job.f(job.a, begin, end);
}

/* A worker that wakes would often be put on the caller's core, where it waits: each gets a core of those allowed. */
static void stay(int32_t mine) {
#ifdef __linux__
  cpu_set_t allowed, one;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  int32_t skip = mine % CPU_COUNT(&allowed);
  for (int32_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (!CPU_ISSET(cpu, &allowed) || skip-- > 0) continue;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof one, &one);
    return;
  }
#endif
}

static void *work(void *number) {
  int32_t mine = (int32_t)(intptr_t)number, seen = first_seen[mine];
  stay(mine);
  for (;;) {
    int32_t spins = 0;
    while (__atomic_load_n(&round_number, __ATOMIC_ACQUIRE) == seen) {
      if (++spins < SPINS) continue;
      pthread_mutex_lock(&lock);
      while (__atomic_load_n(&round_number, __ATOMIC_ACQUIRE) == seen) pthread_cond_wait(&wake, &lock);
      pthread_mutex_unlock(&lock);
    }
    seen = __atomic_load_n(&round_number, __ATOMIC_ACQUIRE);
    if (mine < job.parts) part(mine);
    __atomic_sub_fetch(&remaining, 1, __ATOMIC_ACQ_REL);
  }
  return 0;
}

/* Call f(a, begin, end) on so many threads, which share the rows evenly; returns when all are done. */
void penjing_run(rows_function f, void **a, int32_t rows, int32_t threads) {
  if (threads > MOST) threads = MOST;
  if (threads > rows) threads = rows;
  if (threads <= 1) { f(a, 0, rows); return; }
  if (owner && owner != getpid()) begin_anew();
  owner = getpid();
  pthread_mutex_lock(&callers);
  while (workers < threads - 1) {
    pthread_t thread;
    first_seen[workers + 1] = round_number;  /* a new worker takes no part in the rounds before it */
    if (pthread_create(&thread, 0, work, (void *)(intptr_t)(workers + 1))) break;
    pthread_detach(thread);
    workers++;
  }
  if (workers == 0) { pthread_mutex_unlock(&callers); f(a, 0, rows); return; }
  job.f = f; job.a = a; job.rows = rows; job.parts = threads < workers + 1 ? threads : workers + 1;
  __atomic_store_n(&remaining, workers, __ATOMIC_RELEASE);
  pthread_mutex_lock(&lock);
  __atomic_add_fetch(&round_number, 1, __ATOMIC_ACQ_REL);
  pthread_cond_broadcast(&wake);
  pthread_mutex_unlock(&lock);
  part(0);
  while (__atomic_load_n(&remaining, __ATOMIC_ACQUIRE)) {}
  pthread_mutex_unlock(&callers);
}
"""


def run(library: ctypes.CDLL, name: str, arguments: Any, rows: int, threads: int) -> None:
    """Call the function `name` of a library for all its rows.

    Args:
        library: Of `building.load`.
        name: Of its function.
        arguments: A ctypes array of addresses, from `addresses`.
        rows: How many there are.
        threads: How many threads share them.
    """
    function = getattr(library, f"{name}_rows")
    if threads == 1:
        function(arguments, 0, rows)
    else:
        _pool()(function, arguments, rows, threads)


def addresses(*arrays: np.ndarray) -> Any:
    """Return the addresses of arrays, which must live as long as the result is used."""
    return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of zeros whose address is a multiple of 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out: np.ndarray = raw[start : start + size].view(dtype).reshape(shape)
    return out


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ArtifactError unless an array has a shape: NumPy would repeat a smaller one."""
    if shape != expected:
        raise ArtifactError(
            f"{name} does not have the shape of the kernel", code="shape", got=str(shape), expected=str(expected)
        )


@functools.cache
def _pool() -> Any:
    pool = building.Function("penjing_pool", ("void *",), lambda: SOURCE + _UNUSED)
    return building.load(building.library([pool], SOURCE, INSTRUCTION_SETS["c"])).penjing_run


_UNUSED = "void penjing_pool(void *a, int32_t begin, int32_t end) { (void)a; (void)begin; (void)end; }\n"

__all__ = ["SOURCE", "addresses", "aligned", "check_shape", "run"]
