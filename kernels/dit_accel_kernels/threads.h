/* One function on some threads at once, each of which takes its own share of a job. */
#ifndef DIT_ACCEL_THREADS_H
#define DIT_ACCEL_THREADS_H

#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before any header: RTLD_DEFAULT needs it"
#endif
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define MOST_THREADS 256

typedef struct { void (*part)(void *); void *job; } Start;

static void *begin(void *given) {
    Start *start = given;
    start->part(start->job);
    return NULL;
}

/* Threads of our own live for one part, so that none spins or is left over in a fork; one takes about 20 us. */
static void on_own_threads(void *job, void (*part)(void *), int64_t wanted) {
    pthread_t threads[MOST_THREADS];
    Start start = {part, job};
    int64_t started = 1;
    for (; started < wanted; started++)
        if (pthread_create(&threads[started], NULL, begin, &start)) break;
    part(job);
    for (int64_t i = 1; i < started; i++) pthread_join(threads[i], NULL);
}

typedef void (*Team)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of libgomp, also in libomp */

/* The workers of PyTorch's OpenMP spin for milliseconds after an op of its own; threads beside them would have half
   a core each. So its team does the work where the process has one: the same entry point, found by name. */
static void on_threads(void *job, void (*part)(void *), int64_t wanted) {
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    Team team = wanted > 1 ? (Team)dlsym(RTLD_DEFAULT, "GOMP_parallel") : NULL;
    if (wanted <= 1)
        part(job);
    else if (team && !getenv("DIT_ACCEL_OWN_THREADS"))
        team(part, job, wanted, 0);
    else
        on_own_threads(job, part, wanted);
}

#endif
