/* Threads and scratch memory of the native kernels.

   In: how many tasks, on how many threads. What the main thread computes is shared with the threads of the process's
   OpenMP where it is known: they are awake from torch's operations before, and would spin against others for a core. Two
   pools of our own, created on first use, grown on demand: one computes for other threads, one waits for files. Workers
   that compute spin for some microseconds after a call, because the next one tends to follow at once, then sleep. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "farkv.h"

#define EXPORT __attribute__((visibility("default")))

#define MOST_WORKERS 255

struct pool {
    pthread_mutex_t owner; /* locked by the caller whose tasks run */
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    int64_t n_workers, wanted, n_tasks;
    _Atomic int64_t round_number, next_task, n_running;
    void (*work)(void *, int64_t);
    void *context;
    int spins;
};

#define POOL(n) {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,                                \
                 .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER, .spins = n}
static struct pool pools[] = {POOL(2000), POOL(0)};
enum { COMPUTES, WAITS, N_POOLS };
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* GOMP_parallel(work, context, threads, flags); NULL: not known. And the thread that may call it: every other one would
   get a team of its own. */
typedef void (*team)(void (*)(void *), void *, unsigned, unsigned);
static _Atomic(team) openmp;
static pthread_t main_thread;

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* A forked child has none of its parent's threads, and OpenMP does not find out. */
static void forget_workers(void) {
    atomic_store(&openmp, NULL);
    for (int i = 0; i < N_POOLS; i++) {
        struct pool *p = &pools[i];
        pthread_mutex_init(&p->owner, NULL);
        pthread_mutex_init(&p->lock, NULL);
        pthread_cond_init(&p->wake, NULL);
        pthread_cond_init(&p->done, NULL);
        p->n_workers = 0;
        atomic_store(&p->n_running, 0);
    }
}

static void prepare(void) { pthread_atfork(NULL, NULL, forget_workers); }

static void run_tasks(struct pool *p) {
    for (int64_t task; (task = atomic_fetch_add(&p->next_task, 1)) < p->n_tasks;) p->work(p->context, task);
}

struct worker {
    struct pool *pool;
    int64_t number, seen;
};

static void *serve(void *argument) {
    struct worker me = *(struct worker *)argument;
    struct pool *p = me.pool;
    free(argument);
    for (;;) {
        for (int i = 0; i < p->spins && atomic_load(&p->round_number) == me.seen; i++) relax();
        pthread_mutex_lock(&p->lock);
        while (atomic_load(&p->round_number) == me.seen) pthread_cond_wait(&p->wake, &p->lock);
        me.seen = atomic_load(&p->round_number);
        int called = me.number < p->wanted;
        pthread_mutex_unlock(&p->lock);
        if (!called) continue;
        run_tasks(p);
        if (atomic_fetch_sub(&p->n_running, 1) == 1) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_signal(&p->done);
            pthread_mutex_unlock(&p->lock);
        }
    }
    return NULL;
}

/* Returns the number of workers, at most n; fewer where threads cannot be created. */
static int64_t hire(struct pool *p, int64_t n) {
    if (n > MOST_WORKERS) n = MOST_WORKERS;
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (p->n_workers < n) {
        struct worker *new = malloc(sizeof *new);
        pthread_t thread;
        if (!new) break;
        *new = (struct worker){p, p->n_workers, atomic_load(&p->round_number)};
        if (pthread_create(&thread, &detached, serve, new)) {
            free(new);
            break;
        }
        p->n_workers++;
    }
    pthread_attr_destroy(&detached);
    return p->n_workers < n ? p->n_workers : n;
}

static void share(struct pool *p, int64_t threads, int64_t tasks, void (*f)(void *, int64_t), void *c) {
    int64_t extra = (threads < tasks ? threads : tasks) - 1;
    /* While another thread's call uses the pool, this thread runs its tasks itself. */
    if (extra < 1 || pthread_mutex_trylock(&p->owner)) {
        for (int64_t task = 0; task < tasks; task++) f(c, task);
        return;
    }
    pthread_once(&once, prepare);
    extra = hire(p, extra);
    pthread_mutex_lock(&p->lock);
    p->work = f, p->context = c, p->n_tasks = tasks, p->wanted = extra;
    atomic_store(&p->next_task, 0);
    atomic_store(&p->n_running, extra);
    atomic_fetch_add(&p->round_number, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    run_tasks(p);
    for (int i = 0; i < p->spins && atomic_load(&p->n_running); i++) relax();
    pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->n_running)) pthread_cond_wait(&p->done, &p->lock);
    pthread_mutex_unlock(&p->lock);
    pthread_mutex_unlock(&p->owner);
}

struct loop {
    void (*work)(void *, int64_t);
    void *context;
    int64_t n_tasks;
    _Atomic int64_t next_task;
};

static void run_loop(void *of) {
    struct loop *l = of;
    for (int64_t task; (task = atomic_fetch_add(&l->next_task, 1)) < l->n_tasks;) l->work(l->context, task);
}

EXPORT void farkv_use_openmp(void *parallel) {
    pthread_once(&once, prepare);
    main_thread = pthread_self();
    atomic_store(&openmp, (team)(uintptr_t)parallel);
}

void farkv_parallel(int64_t threads, int64_t tasks, void (*f)(void *, int64_t), void *c) {
    team parallel = atomic_load(&openmp);
    if (!parallel || threads < 2 || tasks < 2 || !pthread_equal(pthread_self(), main_thread)) {
        share(&pools[COMPUTES], threads, tasks, f, c);
        return;
    }
    struct loop l = {f, c, tasks, 0};
    /* As many as torch asks for: a team that shrinks and grows is a team made anew. */
    parallel(run_loop, &l, (unsigned)threads, 0);
}

void farkv_wait_parallel(int64_t threads, int64_t tasks, void (*f)(void *, int64_t), void *c) {
    share(&pools[WAITS], threads, tasks, f, c);
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
