/* What a waiting thread costs: one look in a loop, and being put to sleep and woken. Compiled by thread_waiting.py. */

#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Nanoseconds of one turn of libgomp's waiting loop: a load and the processor's hint that it waits. */
double look_ns(int turns) {
    atomic_int flag = 0;
    double begun = now();
    for (int i = 0; i < turns && !atomic_load_explicit(&flag, memory_order_relaxed); i++)
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#else
        ;
#endif
    return (now() - begun) / turns;
}

static void sleep_while(atomic_int *word, int value) {
    while (atomic_load(word) == value) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, 0, 0, 0);
}

static void set(atomic_int *word, int value) {
    atomic_store(word, value);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, 0, 0, 0);
}

typedef struct { atomic_int ball; int rounds; } Game;

static void *answer(void *shared) {
    Game *game = shared;
    for (int i = 0; i < game->rounds; i++) {
        sleep_while(&game->ball, 0);
        set(&game->ball, 0);
    }
    return 0;
}

/* Nanoseconds from one thread's waking another, which sleeps, to its running: half of a ball's way there and back.
   0 where no thread can be made. */
double wake_ns(int rounds) {
    Game game = {.rounds = rounds};
    pthread_t other;
    if (pthread_create(&other, 0, answer, &game)) return 0;
    double begun = now();
    for (int i = 0; i < rounds; i++) {
        set(&game.ball, 1);
        sleep_while(&game.ball, 1);
    }
    double taken = (now() - begun) / rounds / 2;
    pthread_join(other, 0);
    return taken;
}
