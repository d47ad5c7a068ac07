/* Threads and scratch memory of the native kernels.

   In: how many tasks, on how many threads. One pool per process, created on first use, grown on demand. Workers spin
   for some microseconds after a call, because the next one tends to follow at once, then sleep. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "farkv.h"

#define MOST_WORKERS 255
#define SPINS 2000

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER; /* locked by the caller whose tasks run */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int64_t n_workers, wanted, n_tasks;
static _Atomic int64_t round_number, next_task, n_running;
static void (*work)(void *, int64_t);
static void *context;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A forked child has none of its parent's threads. */
static void forget_workers(void) {
    pthread_mutex_init(&owner, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
    pthread_cond_init(&done, NULL);
    n_workers = 0;
    atomic_store(&n_running, 0);
}

static void prepare(void) { pthread_atfork(NULL, NULL, forget_workers); }

static void run_tasks(void) {
    for (int64_t task; (task = atomic_fetch_add(&next_task, 1)) < n_tasks;) work(context, task);
}

struct worker {
    int64_t number, seen;
};

static void *serve(void *argument) {
    struct worker me = *(struct worker *)argument;
    free(argument);
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&round_number) == me.seen; i++) relax();
        pthread_mutex_lock(&lock);
        while (atomic_load(&round_number) == me.seen) pthread_cond_wait(&wake, &lock);
        me.seen = atomic_load(&round_number);
        int called = me.number < wanted;
        pthread_mutex_unlock(&lock);
        if (!called) continue;
        run_tasks();
        if (atomic_fetch_sub(&n_running, 1) == 1) {
            pthread_mutex_lock(&lock);
            pthread_cond_signal(&done);
            pthread_mutex_unlock(&lock);
        }
    }
    return NULL;
}

/* Returns the number of workers, at most n; fewer where threads cannot be created. */
static int64_t hire(int64_t n) {
    if (n > MOST_WORKERS) n = MOST_WORKERS;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (n_workers < n) {
        struct worker *new = malloc(sizeof *new);
        pthread_t thread;
        if (!new) break;
        *new = (struct worker){n_workers, atomic_load(&round_number)};
        if (pthread_create(&thread, &detached, serve, new)) {
            free(new);
            break;
        }
        n_workers++;
    }
    pthread_attr_destroy(&detached);
    return n_workers < n ? n_workers : n;
}

void farkv_parallel(int64_t threads, int64_t tasks, void (*f)(void *, int64_t), void *c) {
    int64_t extra = (threads < tasks ? threads : tasks) - 1;
    /* While another thread's call uses the pool, this thread runs its tasks itself. */
    if (extra < 1 || pthread_mutex_trylock(&owner)) {
        for (int64_t task = 0; task < tasks; task++) f(c, task);
        return;
    }
    pthread_once(&once, prepare);
    extra = hire(extra);
    pthread_mutex_lock(&lock);
    work = f, context = c, n_tasks = tasks, wanted = extra;
    atomic_store(&next_task, 0);
    atomic_store(&n_running, extra);
    atomic_fetch_add(&round_number, 1);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    run_tasks();
    for (int i = 0; i < SPINS && atomic_load(&n_running); i++) relax();
    pthread_mutex_lock(&lock);
    while (atomic_load(&n_running)) pthread_cond_wait(&done, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&owner);
}

static __thread struct {
    void *at;
    size_t n_bytes;
} scratch[N_SCRATCH];
static pthread_key_t at_exit;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;

static void free_scratch(void *slots) {
    for (int i = 0; i < N_SCRATCH; i++) free(((__typeof__(scratch[0]) *)slots)[i].at);
}

static void make_key(void) { pthread_key_create(&at_exit, free_scratch); }

void *farkv_scratch(int slot, size_t n_bytes) {
    if (scratch[slot].n_bytes >= n_bytes) return scratch[slot].at;
    pthread_once(&key_once, make_key);
    pthread_setspecific(at_exit, scratch);
    free(scratch[slot].at);
    size_t rounded = (n_bytes + n_bytes / 4 + 4095) / 4096 * 4096;
    void *new = NULL;
    if (posix_memalign(&new, 64, rounded)) new = NULL;
    scratch[slot].at = new;
    scratch[slot].n_bytes = new ? rounded : 0;
    return new;
}
