/* The native relay: joins pairs of connected sockets in a thread of its own.
 *
 * Python accepts, speaks the handshake and dials; a flow that lives on is then handed over (gostnet_relay_add). The
 * sockets stay Python's to close: the thread only reads and writes them, and has let go of them when it reports the end
 * of the flow or when gostnet_relay_cancel has returned.
 *
 * Threads. One thread moves bytes. All functions of the interface are called from one other thread, the caller, which
 * owns the table of flows and the free list. What both touch is guarded by the lock of the flow, which the mover holds
 * while it works on that flow; counters are atomic. News for the caller (a flow has ended, a direction waits for
 * leave to move more) are a list of flows under a lock of its own, announced by an eventfd.
 *
 * Readiness. Every socket is registered once, edge-triggered. An operation is tried until it would block, unless a short
 * read has shown that the queue is empty; a direction that uses up its budget is put on a list and goes on after the
 * others. Small messages are moved by recv and send; a direction that fills its buffer changes to splice through a
 * pooled pipe, which it holds only while bytes are in it. So an idle flow costs two sockets and one struct.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    VERSION = 4,          /* of the library's interface; the caller refuses another one */
    SMALL = 32768,        /* bytes of one recv; a read that fills it says bulk */
    STAYS_BULK = 131072,  /* bytes in one go after which the next go begins with splice at once */
    PIPE_SIZE = 262144,   /* bytes: half of it halves the rate, four times it gains nothing (measured) */
    POOL = 64,            /* empty pipes kept for the next burst */
    BUDGET = 16,          /* rounds before a direction lets the other flows go first */
    BATCH = 128,          /* events taken from the kernel at once */
};

enum { ENDED = 1, WANTS = 2 /* shifted by the direction */ };

/* One direction: 0 is up, from the client (socket 0) to the upstream (socket 1); 1 is down. It reads from the socket
 * of its own number. At most one of `rest` and the pipe holds bytes. */
struct direction {
    int pipe[2];           /* read end, write end; -1 without a pipe */
    uint32_t in_pipe;      /* bytes */
    char *rest;            /* what one send did not take */
    uint32_t rest_at, rest_len;
    uint32_t wanted;       /* bytes that wait for leave, told with WANTS */
    uint64_t credit;       /* bytes that may move, if `limited` */
    uint64_t burst;        /* bytes read since the source was last found empty */
    _Atomic uint64_t taken, moved;  /* bytes read, bytes sent */
    int failed;            /* errno of the sink */
    bool limited;
    bool asked;            /* leave has been asked for and not been given yet */
    bool try_read;         /* a read may yield something */
    bool hung_up;          /* the source's peer has closed and its edge has been: read on until the end */
    bool blocked;          /* the sink is full: an edge will say when it is not */
    bool copies;           /* this source or sink knows no splice */
    bool bulk, eof, done, shut;
};

struct flow {
    pthread_mutex_t lock;
    int fd[2];
    struct direction way[2];
    atomic_bool leaving;   /* the caller waits for `lock`: let go soon, and do not take it again */
    bool live;             /* the mover may touch it */
    bool closes;           /* the mover closes the sockets when all has gone well */
    bool closed;           /* and has done so */
    bool armed[2];         /* the socket's edges say when it has room again */
    bool noted;            /* it is in the list of news */
    unsigned news;
    int error;             /* errno of a source, which ends both directions */
    int first;             /* the socket whose end or error came first, -1 for none yet */
    struct flow *next_news;
    /* the mover's */
    bool queued;
    struct flow *next_queued;
    /* the caller's */
    bool held;
    uint32_t id;
    uint64_t reported;     /* taken + moved of both directions when they were last told */
    struct flow *next_free;
};

struct relay {
    pthread_t thread;
    int epoll, wake, news_fd;
    atomic_bool stopping;
    atomic_int refused;    /* errno of the last pipe or splice that there was not, EDQUOT for pipes that are too small */
    pthread_mutex_t news_lock;
    struct flow *news;
    /* the mover's */
    struct flow *queue, **queue_end;
    int pool[POOL][2];
    int pooled;
    char *buffer;
    /* the caller's */
    struct flow **flows;
    uint32_t count, room;
    struct flow *free;
};

/* What the caller is told. Keep in step with engine.py. */
struct record {
    uint32_t id, news;
    int32_t error, failed[2], first;
    uint32_t shut, wanted[2], closed;
    uint64_t taken[2], moved[2];
};

/* ---- pipes ------------------------------------------------------------------------------------------------------ */

static bool take_pipe(struct relay *relay, struct direction *way)
{
    if (way->pipe[0] >= 0)
        return true;
    if (relay->pooled) {
        relay->pooled--;
        way->pipe[0] = relay->pool[relay->pooled][0];
        way->pipe[1] = relay->pool[relay->pooled][1];
        return true;
    }
    if (pipe2(way->pipe, O_NONBLOCK | O_CLOEXEC)) {
        way->pipe[0] = way->pipe[1] = -1;
        atomic_store_explicit(&relay->refused, errno, memory_order_relaxed);
        return false; /* no descriptors are left: recv and send do without */
    }
    /* Up to pipe-user-pages-soft it keeps its default size, which is slower; beyond it is smaller than one recv. */
    if (fcntl(way->pipe[1], F_SETPIPE_SZ, PIPE_SIZE) < 0 && fcntl(way->pipe[1], F_GETPIPE_SZ) < SMALL) {
        close(way->pipe[0]);
        close(way->pipe[1]);
        way->pipe[0] = way->pipe[1] = -1;
        atomic_store_explicit(&relay->refused, EDQUOT, memory_order_relaxed);
        return false;
    }
    return true;
}

/* Only the mover uses the pool: `relay` is NULL when somebody else clears a flow. */
static void drop_pipe(struct relay *relay, struct direction *way)
{
    if (way->pipe[0] < 0)
        return;
    if (relay && !way->in_pipe && relay->pooled < POOL) {
        relay->pool[relay->pooled][0] = way->pipe[0];
        relay->pool[relay->pooled][1] = way->pipe[1];
        relay->pooled++;
    } else {
        close(way->pipe[0]);
        close(way->pipe[1]);
    }
    way->pipe[0] = way->pipe[1] = -1;
    way->in_pipe = 0;
}

static void end_direction(struct relay *relay, struct direction *way)
{
    way->done = true;
    drop_pipe(relay, way);
    free(way->rest);
    way->rest = NULL;
    way->rest_len = 0;
}

/* ---- news ------------------------------------------------------------------------------------------------------- */

/* Tell the caller something about a flow, whose lock is held. */
static void tell(struct relay *relay, struct flow *flow, unsigned what)
{
    flow->news |= what;
    if (flow->noted)
        return;
    flow->noted = true;
    pthread_mutex_lock(&relay->news_lock);
    bool first = !relay->news;
    flow->next_news = relay->news;
    relay->news = flow;
    pthread_mutex_unlock(&relay->news_lock);
    if (first) {
        uint64_t one = 1;
        (void)!write(relay->news_fd, &one, sizeof one);
    }
}

/* ---- readiness -------------------------------------------------------------------------------------------------- */

/* Watch a socket, or change what is told of it, which brings an edge for what is true at that moment. A socket that has
 * always had room is not asked for it: the first edge of a new socket would wake the mover for nothing. */
static int watch(struct relay *relay, struct flow *flow, int side, int operation)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (flow->armed[side] ? EPOLLOUT : 0),
                                .data.u64 = (uint64_t)(uintptr_t)flow | (uint64_t)side};
    return epoll_ctl(relay->epoll, operation, flow->fd[side], &event);
}

/* The sink of a direction is full: an edge will say when it is not. */
static void block(struct relay *relay, struct flow *flow, int index)
{
    int sink = !index;
    flow->way[index].blocked = true;
    if (!flow->armed[sink]) {
        flow->armed[sink] = true;
        watch(relay, flow, sink, EPOLL_CTL_MOD);
    }
}

/* ---- moving bytes ----------------------------------------------------------------------------------------------- */

static void note_first(struct flow *flow, int side)
{
    if (flow->first < 0)
        flow->first = side;
}

/* The sink refuses bytes: this direction is over, what the other side still has to say is read to its end. */
static void lose_sink(struct relay *relay, struct flow *flow, int index, int error)
{
    flow->way[index].failed = error;
    note_first(flow, !index);
    end_direction(relay, &flow->way[index]);
    flow->way[!index].try_read = flow->way[!index].hung_up = true;
}

/* Send what is under way. Returns bytes sent, or -1 with errno. */
static ssize_t flush(struct direction *way, int sink)
{
    ssize_t sent;
    if (way->rest_len) {
        sent = send(sink, way->rest + way->rest_at, way->rest_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            way->rest_at += (uint32_t)sent;
            way->rest_len -= (uint32_t)sent;
            if (!way->rest_len) {
                free(way->rest);
                way->rest = NULL;
            }
        }
    } else {
        sent = splice(way->pipe[0], NULL, sink, NULL, way->in_pipe, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (sent > 0)
            way->in_pipe -= (uint32_t)sent;
    }
    if (sent > 0)
        way->moved += (uint64_t)sent;
    return sent;
}

/* Read a small piece and send it at once. Returns bytes read, 0 at the end, or -1 with errno if the read failed. */
static ssize_t copy(struct relay *relay, struct flow *flow, int index, size_t most)
{
    struct direction *way = &flow->way[index];
    ssize_t got = recv(flow->fd[index], relay->buffer, most, MSG_DONTWAIT);
    if (got <= 0)
        return got;
    ssize_t sent = send(flow->fd[!index], relay->buffer, (size_t)got, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR) {
            lose_sink(relay, flow, index, errno);
            return got;
        }
        if (errno == EAGAIN)
            block(relay, flow, index);
        sent = 0;
    }
    way->moved += (uint64_t)sent;
    if (sent < got) {
        way->rest_len = (uint32_t)(got - sent);
        way->rest_at = 0;
        way->rest = malloc(way->rest_len);
        if (!way->rest) {
            way->rest_len = 0;
            lose_sink(relay, flow, index, ENOMEM);
            return got;
        }
        memcpy(way->rest, relay->buffer + sent, way->rest_len);
    }
    return got;
}

/* Ask the caller for leave to move what is there, or find out that nothing is. Returns as recv does. */
static ssize_t ask(struct relay *relay, struct flow *flow, int index)
{
    struct direction *way = &flow->way[index];
    char byte;
    ssize_t there = recv(flow->fd[index], &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (there > 0 && !way->asked) {
        int queued = 0;
        if (ioctl(flow->fd[index], FIONREAD, &queued) || queued < 1)
            queued = 1;
        way->asked = true;
        way->wanted = (uint32_t)queued;
        tell(relay, flow, WANTS << index);
    }
    return there;
}

/* Move bytes until something blocks or the direction ends. Returns true if the budget ended it.
 * A source that breaks is noted in flow->error. */
static bool pump(struct relay *relay, struct flow *flow, int index)
{
    struct direction *way = &flow->way[index];
    for (int round = 0; round < BUDGET; round++) {
        /* 1. whoever wants the flow back, or has ended it, goes first */
        if (way->done || atomic_load_explicit(&flow->leaving, memory_order_relaxed))
            return false;
        /* 2. what is under way must leave */
        if (way->rest_len || way->in_pipe) {
            if (way->blocked)
                return false;
            if (flush(way, flow->fd[!index]) < 0 && errno != EINTR) {
                if (errno != EAGAIN) {
                    lose_sink(relay, flow, index, errno);
                    return true;
                }
                block(relay, flow, index);
                return false;
            }
            continue;
        }
        if (way->eof) {
            end_direction(relay, way);
            if (!flow->way[!index].done) { /* otherwise the caller's close sends the FIN */
                if (shutdown(flow->fd[!index], SHUT_WR) && errno != ENOTCONN)
                    way->failed = errno;
                way->shut = true;
            }
            return false;
        }
        if (!way->try_read)
            return false;
        /* 3. take more, as much as is allowed */
        size_t most = SMALL;
        ssize_t got;
        bool spliced = false;
        if (way->limited && !way->credit) {
            got = ask(relay, flow, index);
            if (got > 0)
                return false;
        } else {
            spliced = way->bulk && !way->copies && take_pipe(relay, way);
            if (spliced)
                most = PIPE_SIZE;
            if (way->limited && way->credit < most)
                most = (size_t)way->credit;
            if (spliced) {
                got = splice(flow->fd[index], NULL, way->pipe[1], NULL, most, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
                if (got > 0)
                    way->in_pipe = (uint32_t)got;
            } else {
                got = copy(relay, flow, index, most);
            }
        }
        if (got < 0) {
            if (errno == EINTR)
                continue;
            if (spliced && (errno == EINVAL || errno == ENOSYS || errno == EPERM || errno == EOPNOTSUPP)) {
                atomic_store_explicit(&relay->refused, errno, memory_order_relaxed);
                way->copies = true;
                continue;
            }
            if (errno != EAGAIN) {
                flow->error = errno;
                note_first(flow, index);
                return false;
            }
            way->try_read = false;
            way->bulk = way->burst >= STAYS_BULK;
            way->burst = 0;
            drop_pipe(relay, way);
            return false;
        }
        if (got == 0) {
            way->eof = true;
            note_first(flow, index);
            continue;
        }
        way->taken += (uint64_t)got;
        way->burst += (uint64_t)got;
        if (way->limited)
            way->credit -= (uint64_t)got;
        if (way->done) /* the sink broke under it: the other direction has something to do */
            return true;
        if (!spliced) {
            if ((size_t)got == SMALL) {
                way->bulk = true;
            } else if ((size_t)got < most) {
                /* A short read has emptied the queue: more brings an edge, unless the last edge was the hang-up. */
                way->try_read = way->hung_up;
                way->burst = 0;
            }
        }
    }
    return true;
}

/* Let go of a flow whose lock is held: after this only the caller touches it. Closing the sockets takes them out of the
 * epoll set; edges until then find a flow that is not live, or make one try an operation in vain. */
static void release(struct relay *pool, struct flow *flow)
{
    flow->live = false;
    for (int side = 0; side < 2; side++)
        end_direction(pool, &flow->way[side]);
}

static void finish(struct relay *relay, struct flow *flow)
{
    release(relay, flow);
    if (flow->closes && !flow->error && !flow->way[0].failed && !flow->way[1].failed) {
        close(flow->fd[0]);
        close(flow->fd[1]);
        flow->closed = true;
    }
    tell(relay, flow, ENDED);
}

/* Pump both directions of a live flow, whose lock is held, and see to what follows. */
static void serve(struct relay *relay, struct flow *flow)
{
    bool again = pump(relay, flow, 0);
    if (!flow->error)
        again |= pump(relay, flow, 1);
    if (flow->error || (flow->way[0].done && flow->way[1].done)) {
        finish(relay, flow);
    } else if (again && !flow->queued) {
        flow->queued = true;
        flow->next_queued = NULL;
        *relay->queue_end = flow;
        relay->queue_end = &flow->next_queued;
    }
}

static void note_events(struct flow *flow, int side, uint32_t events)
{
    struct direction *reads = &flow->way[side], *writes = &flow->way[!side];
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        reads->try_read = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        reads->hung_up = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
        writes->blocked = false;
}

static void *move(void *argument)
{
    struct relay *relay = argument;
    struct epoll_event events[BATCH];
    while (!atomic_load(&relay->stopping)) {
        int count = epoll_wait(relay->epoll, events, BATCH, relay->queue ? 0 : -1);
        struct flow *waiting = relay->queue;
        relay->queue = NULL;
        relay->queue_end = &relay->queue;
        for (int i = 0; i < count; i++) {
            if (!events[i].data.u64)
                continue; /* gostnet_relay_stop woke us */
            /* Flows are never freed before the thread has ended, so an event of one that has been cancelled, and even
             * given to another pair since, does no harm: it makes an operation be tried. */
            struct flow *flow = (struct flow *)(uintptr_t)(events[i].data.u64 & ~(uint64_t)1);
            if (atomic_load(&flow->leaving))
                continue;
            pthread_mutex_lock(&flow->lock);
            if (flow->live) {
                note_events(flow, (int)(events[i].data.u64 & 1), events[i].events);
                if (!flow->queued)
                    serve(relay, flow);
            }
            pthread_mutex_unlock(&flow->lock);
        }
        while (waiting) {
            struct flow *flow = waiting;
            waiting = flow->next_queued;
            flow->queued = false;
            if (atomic_load(&flow->leaving))
                continue;
            pthread_mutex_lock(&flow->lock);
            if (flow->live)
                serve(relay, flow);
            pthread_mutex_unlock(&flow->lock);
        }
    }
    return NULL;
}

/* ---- the interface ---------------------------------------------------------------------------------------------- */

EXPORT int gostnet_relay_version(void)
{
    return VERSION;
}

static void destroy(struct relay *relay)
{
    for (uint32_t i = 0; i < relay->count; i++) {
        struct flow *flow = relay->flows[i];
        for (int side = 0; side < 2; side++)
            end_direction(NULL, &flow->way[side]);
        pthread_mutex_destroy(&flow->lock);
        free(flow);
    }
    while (relay->pooled) {
        relay->pooled--;
        close(relay->pool[relay->pooled][0]);
        close(relay->pool[relay->pooled][1]);
    }
    if (relay->epoll >= 0)
        close(relay->epoll);
    if (relay->wake >= 0)
        close(relay->wake);
    pthread_mutex_destroy(&relay->news_lock);
    free(relay->flows);
    free(relay->buffer);
    free(relay);
}

/* Start a mover that announces news on the eventfd `news_fd`, which stays the caller's. NULL if that cannot be. */
EXPORT struct relay *gostnet_relay_start(int news_fd)
{
    struct relay *relay = calloc(1, sizeof *relay);
    if (!relay)
        return NULL;
    relay->news_fd = news_fd;
    relay->queue_end = &relay->queue;
    pthread_mutex_init(&relay->news_lock, NULL);
    relay->epoll = epoll_create1(EPOLL_CLOEXEC);
    relay->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    relay->buffer = malloc(SMALL);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0};
    sigset_t all, before;
    sigfillset(&all);
    if (relay->epoll < 0 || relay->wake < 0 || !relay->buffer ||
        epoll_ctl(relay->epoll, EPOLL_CTL_ADD, relay->wake, &event)) {
        destroy(relay);
        return NULL;
    }
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's, SIGPIPE of splice is nobody's */
    int error = pthread_create(&relay->thread, NULL, move, relay);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        destroy(relay);
        return NULL;
    }
    pthread_setname_np(relay->thread, "gostnet-relay");
    return relay;
}

/* End the thread and forget all flows; their sockets are the caller's. */
EXPORT void gostnet_relay_stop(struct relay *relay)
{
    uint64_t one = 1;
    atomic_store(&relay->stopping, true);
    (void)!write(relay->wake, &one, sizeof one);
    pthread_join(relay->thread, NULL);
    destroy(relay);
}

static struct flow *new_flow(struct relay *relay)
{
    struct flow *flow = relay->free;
    if (flow) {
        relay->free = flow->next_free;
        return flow;
    }
    if (relay->count == relay->room) {
        uint32_t room = relay->room ? relay->room * 2 : 256;
        struct flow **flows = realloc(relay->flows, room * sizeof *flows);
        if (!flows)
            return NULL;
        relay->flows = flows;
        relay->room = room;
    }
    flow = calloc(1, sizeof *flow);
    if (!flow)
        return NULL;
    pthread_mutex_init(&flow->lock, NULL);
    flow->id = relay->count;
    relay->flows[relay->count++] = flow;
    return flow;
}

static void free_flow(struct relay *relay, struct flow *flow)
{
    flow->held = false;
    flow->next_free = relay->free;
    relay->free = flow;
}

/* Join two non-blocking sockets. Bit i of `limited`: direction i moves only what gostnet_relay_grant allows; of `done`:
 * it has ended already. With `closes` the sockets of a flow that ends without an error are closed here, as its record
 * says. Returns the flow's id, or -1 with nothing changed. */
EXPORT int64_t gostnet_relay_add(struct relay *relay, int client, int upstream, unsigned limited, unsigned done,
                                 int closes)
{
    struct flow *flow = new_flow(relay);
    if (!flow)
        return -1;
    pthread_mutex_lock(&flow->lock); /* an edge of the first socket waits until the second is registered too */
    flow->fd[0] = client;
    flow->fd[1] = upstream;
    flow->error = 0;
    flow->first = -1;
    flow->news = 0;
    flow->reported = 0;
    flow->closes = closes;
    flow->closed = flow->armed[0] = flow->armed[1] = false;
    for (int i = 0; i < 2; i++) {
        memset(&flow->way[i], 0, sizeof flow->way[i]);
        flow->way[i].pipe[0] = flow->way[i].pipe[1] = -1;
        flow->way[i].limited = limited >> i & 1;
        flow->way[i].done = done >> i & 1;
    }
    bool ok = true;
    for (int side = 0; side < 2 && ok; side++) {
        ok = !watch(relay, flow, side, EPOLL_CTL_ADD);
        if (!ok && side)
            epoll_ctl(relay->epoll, EPOLL_CTL_DEL, flow->fd[0], NULL);
    }
    flow->live = ok;
    pthread_mutex_unlock(&flow->lock);
    if (!ok) {
        free_flow(relay, flow);
        return -1;
    }
    flow->held = true;
    return flow->id;
}

/* Return why bytes are copied instead of spliced somewhere, an errno (EDQUOT: pipes are too small), 0 if none are. */
EXPORT int gostnet_relay_refused(struct relay *relay)
{
    return atomic_load_explicit(&relay->refused, memory_order_relaxed);
}

static void fill(struct record *record, struct flow *flow)
{
    memset(record, 0, sizeof *record);
    record->id = flow->id;
    for (int i = 0; i < 2; i++) {
        record->taken[i] = flow->way[i].taken;
        record->moved[i] = flow->way[i].moved;
    }
}

static void fill_locked(struct record *record, struct flow *flow)
{
    fill(record, flow);
    record->news = flow->news;
    record->error = flow->error;
    record->first = flow->first;
    record->closed = flow->closed;
    for (int i = 0; i < 2; i++) {
        record->failed[i] = flow->way[i].failed;
        record->wanted[i] = flow->way[i].wanted;
        record->shut |= (uint32_t)flow->way[i].shut << i;
    }
}

/* Take a flow back before its end: when this returns, the mover has let go of the sockets; bytes under way are lost.
 * Counters are in `record`. */
EXPORT void gostnet_relay_cancel(struct relay *relay, uint32_t id, struct record *record)
{
    struct flow *flow = relay->flows[id];
    atomic_store(&flow->leaving, true);
    pthread_mutex_lock(&flow->lock);
    if (flow->live) {
        release(NULL, flow);
        epoll_ctl(relay->epoll, EPOLL_CTL_DEL, flow->fd[0], NULL);
        epoll_ctl(relay->epoll, EPOLL_CTL_DEL, flow->fd[1], NULL);
    }
    fill_locked(record, flow);
    flow->news = 0;
    bool noted = flow->noted;
    pthread_mutex_unlock(&flow->lock);
    atomic_store(&flow->leaving, false);
    flow->held = false;
    if (!noted) /* otherwise gostnet_relay_news frees it when it comes to it */
        free_flow(relay, flow);
}

/* Allow a direction to move `bytes` more. */
EXPORT void gostnet_relay_grant(struct relay *relay, uint32_t id, int index, uint64_t bytes)
{
    struct flow *flow = relay->flows[id];
    pthread_mutex_lock(&flow->lock);
    if (flow->live) {
        struct direction *way = &flow->way[index];
        way->credit += bytes;
        way->asked = false;
        way->try_read = true;
        watch(relay, flow, index, EPOLL_CTL_MOD); /* brings an edge, since there is something to read */
    }
    pthread_mutex_unlock(&flow->lock);
}

/* Fill at most `most` records with news and return how many there were. A record that says ENDED gives the id back. */
EXPORT int gostnet_relay_news(struct relay *relay, struct record *records, int most)
{
    int count = 0;
    while (count < most) {
        pthread_mutex_lock(&relay->news_lock);
        struct flow *flow = relay->news;
        if (flow)
            relay->news = flow->next_news;
        pthread_mutex_unlock(&relay->news_lock);
        if (!flow)
            break;
        pthread_mutex_lock(&flow->lock);
        flow->noted = false;
        fill_locked(&records[count], flow);
        flow->news = 0;
        pthread_mutex_unlock(&flow->lock);
        if (!flow->held) {
            free_flow(relay, flow);
            continue;
        }
        if (records[count].news & ENDED)
            free_flow(relay, flow);
        count++;
    }
    return count;
}

/* Fill `record` with the counters of a flow as they are now. */
EXPORT void gostnet_relay_count(struct relay *relay, uint32_t id, struct record *record)
{
    fill(record, relay->flows[id]);
}

/* Fill at most `most` records with the counters of flows that have moved since they were last told, from the id `*from`
 * on; return how many. `*from` is set to where the next call goes on, to the number of ids at the end. */
EXPORT int gostnet_relay_moved(struct relay *relay, uint32_t *from, struct record *records, int most)
{
    int count = 0;
    for (; *from < relay->count && count < most; ++*from) {
        struct flow *flow = relay->flows[*from];
        if (!flow->held)
            continue;
        fill(&records[count], flow);
        struct record *record = &records[count];
        uint64_t sum = record->taken[0] + record->taken[1] + record->moved[0] + record->moved[1];
        if (sum != flow->reported) {
            flow->reported = sum;
            count++;
        }
    }
    return count;
}
