/* Joined UDP flows: the peers of one listening socket, each with a connected socket of its own.
 *
 * Python accepts a peer, finds its target and opens the connected socket; then it joins the two (gostnet_udp_join) and
 * is no longer in the way of the datagrams: a thread passes them, the mover, one for all tables of a loop. It reads a
 * listening socket as long as one of its peers is joined; otherwise Python's loop does (gostnet_udp_up). What is nobody's
 * yet waits in the table's queue until Python takes it (gostnet_udp_news), and so do the counts of what has moved.
 *
 * A batch is one recvmmsg, or a few of connected sockets, and as few sends as can be: what goes to one flow is sent
 * together, datagrams of one size in a row as a train that the kernel cuts (UDP_SEGMENT); trains that the kernel has
 * joined on the way in (UDP_GRO) stay trains. Payloads stay where they have been received.
 *
 * Answers leave from the address that was asked (IP_PKTINFO), or, for captured datagrams, by a raw socket with the
 * original destination as their source.
 *
 * One lock guards everything; the mover holds it for a batch at a time, and who else wants it is next (`enter`). The
 * caller's news are announced by an eventfd: at once if there is something to decide, otherwise once per look at the
 * counts, so that nothing wakes up where nothing moves.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#define IP_ORIGINAL 20    /* IP_ORIGDSTADDR */
#define IPV6_ORIGINAL 74  /* IPV6_ORIGDSTADDR */

enum {
    BATCH = 64,            /* datagrams, or trains, of one call; what the arrays of the caller hold */
    SHARE = 16,            /* of them from one connected socket before the others get their turn */
    SLOT = 65536,          /* bytes: larger than any datagram or train */
    CONTROL = 128,         /* bytes of control data on the way in: an address and a size */
    MOST_SEGMENTS = 64,    /* of one train: UDP_MAX_SEGMENTS up to Linux 6.8 */
    LARGEST_TRAIN = 65000, /* bytes: a datagram less the headers of IPv6 with some extension headers */
    RETRIES = 4,           /* of a call that told of an error of an earlier datagram */
    WAITING = 8192,        /* datagrams of a table that wait for the caller; more are dropped, */
    WAITING_BYTES = 8 << 20, /* and so are more bytes */
    BUDGET = 16,           /* batches before the mover asks for events again */
};

enum { CAPTURED = 1, PINNED = 2 }; /* answers by raw sockets; answers from the address that was asked */

/* Whom a datagram is from and where it was sent. Addresses of IPv4 as ::ffff:a.b.c.d; ports big endian. */
struct key {
    uint8_t peer[16], local[16];
    uint32_t zone, local_zone;
    uint16_t port, local_port;
};

/* What has moved for one flow in one batch. */
struct run {
    int32_t slot;
    int error;
    int64_t packets, bytes, dropped;
};

/* What a flow has moved since the caller was told last; 64 bits each, so that Python reads them as a list of numbers.
 * `at` is when something moved last, in ns of CLOCK_MONOTONIC. */
struct count {
    int64_t slot, up, up_bytes, down, down_bytes, dropped, error, at;
};

/* A datagram, or a train of datagrams of `stride` bytes, that is left to Python: valid until the next call. */
struct arrival {
    struct key key;
    uint32_t size, stride;
    int64_t slot; /* of its flow on the way down, -1 on the way up */
    const void *data;
};

struct waiting {
    struct waiting *next;
    struct arrival arrival;
    uint8_t data[];
};

union name {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

struct flow {
    struct key key;
    uint32_t hash;
    int32_t next;       /* in its chain of the hash table, or in the free list */
    int32_t ready_next; /* in the list of those that have something to read */
    int32_t moved_next; /* in the list of those that have moved something */
    int upstream;       /* descriptor, Python's to close; -1 if the slot is free */
    uint32_t serial;    /* of the last batch with something of it, and its place in there: */
    int16_t run, last;
    uint16_t cuts_up, cuts_down; /* the longest datagram that may be in a train; 0: no trains */
    bool ready, dead, moved;
    bool answered;      /* the target has: an error is news for the caller no more */
    bool held;          /* an answer waits for the caller: what comes after it stays behind it */
    struct count count;
};

struct message { /* beside each received header */
    int32_t flow;
    int16_t next;
    uint16_t stride;
    uint32_t size;
};

struct sent { /* beside each header to be sent */
    struct run *run;
    uint16_t *cuts;
    uint32_t packets, bytes;
    uint16_t segment;
};

struct table {
    struct mover *mover;
    uint32_t number; /* its place in the mover's list */
    int fd, raw[2];
    bool v6, captured, pinned;
    bool joins;    /* the kernel joins what arrives */
    bool watched;  /* the mover reads the listening socket */
    bool readable; /* and has not emptied it yet */
    uint32_t seed, buckets, count, size;
    int32_t free, ready_first, ready_last, moved_first;
    int32_t *heads;
    struct flow *flows;
    struct waiting *first, *last, *taken;
    uint32_t waiting, waiting_bytes;
    int64_t dropped;
};

struct mover {
    pthread_t thread;
    pthread_mutex_t lock, turn;
    int epoll, wake, news;
    bool running;
    atomic_bool stopping;
    unsigned told; /* news that the caller knows of: COUNTS, DECIDE */
    bool single;   /* there is no recvmmsg, or no sendmmsg */
    int refused;   /* errno with which a train has been refused that was not too long for its way, 0 for none */
    struct table **tables;
    uint32_t room;
    uint32_t serial;
    uint8_t *data;
    struct mmsghdr in[BATCH], out[BATCH];
    struct iovec in_iov[BATCH], out_iov[2 * BATCH];
    union name in_names[BATCH], out_names[BATCH];
    char in_control[BATCH][CONTROL] __attribute__((aligned(8)));
    char out_control[BATCH][CONTROL] __attribute__((aligned(8)));
    uint8_t headers[BATCH][48];
    struct message messages[BATCH];
    struct sent sent[BATCH];
    struct run runs[BATCH];
    int used; /* received headers that need to be set up again */
    int out_fd, pending, iovs;
};

enum { COUNTS = 1, DECIDE = 2 };
static const uint32_t LISTENING = UINT32_MAX; /* instead of a slot */

/* ---- the lock ---------------------------------------------------------------------------------------------------- */
/* Who waits for the lock is next in turn: the mover, which takes it again and again, never keeps the caller out. */
static void enter(struct mover *m) {
    pthread_mutex_lock(&m->turn);
    pthread_mutex_lock(&m->lock);
    pthread_mutex_unlock(&m->turn);
}

static void leave(struct mover *m) { pthread_mutex_unlock(&m->lock); }

static void signal_by(int fd) {
    uint64_t one = 1;
    (void)!write(fd, &one, sizeof one);
}

/* Tell the caller that there is news, unless it knows. */
static void tell(struct mover *m, unsigned what) {
    if (m->told & what)
        return;
    m->told |= what;
    signal_by(m->news);
}

/* ---- the table of flows ----------------------------------------------------------------------------------------- */
static uint32_t hash_of(const struct table *t, const struct key *key) {
    const uint8_t *at = (const uint8_t *)key;
    uint64_t hash = t->seed;
    for (size_t i = 0; i < sizeof *key; i += 4) {
        uint32_t word;
        memcpy(&word, at + i, 4);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return (uint32_t)(hash >> 16);
}

static int32_t find(struct table *t, const struct key *key) {
    uint32_t hash = hash_of(t, key);
    for (int32_t i = t->heads[hash & (t->buckets - 1)]; i >= 0; i = t->flows[i].next)
        if (t->flows[i].hash == hash && !memcmp(&t->flows[i].key, key, sizeof *key))
            return i;
    return -1;
}

static bool grow(struct table *t) {
    uint32_t size = t->size ? t->size * 2 : 64;
    struct flow *flows = realloc(t->flows, size * sizeof *flows);
    if (!flows)
        return false;
    t->flows = flows;
    int32_t *heads = malloc(size * sizeof *heads);
    if (!heads)
        return false;
    for (uint32_t i = 0; i < size; i++)
        heads[i] = -1;
    for (uint32_t i = 0; i < t->size; i++)
        if (flows[i].upstream >= 0) {
            flows[i].next = heads[flows[i].hash & (size - 1)];
            heads[flows[i].hash & (size - 1)] = (int32_t)i;
        }
    free(t->heads);
    t->heads = heads;
    t->buckets = size;
    for (uint32_t i = size; i-- > t->size;) {
        flows[i] = (struct flow){.upstream = -1, .next = t->free, .ready_next = -1};
        t->free = (int32_t)i;
    }
    t->size = size;
    return true;
}

static bool set(int fd, int option, int value) { return !setsockopt(fd, IPPROTO_UDP, option, &value, sizeof value); }

static void free_list(struct waiting *item) {
    while (item) {
        struct waiting *next = item->next;
        free(item);
        item = next;
    }
}

/* Take apart all flows of a table, and forget it; the sockets stay their owners'. */
EXPORT void gostnet_udp_close(struct table *t) {
    struct mover *m = t->mover;
    enter(m);
    m->tables[t->number] = NULL;
    if (t->watched)
        epoll_ctl(m->epoll, EPOLL_CTL_DEL, t->fd, NULL);
    for (uint32_t i = 0; i < t->size; i++)
        if (t->flows[i].upstream >= 0)
            epoll_ctl(m->epoll, EPOLL_CTL_DEL, t->flows[i].upstream, NULL);
    leave(m);
    free_list(t->first);
    free_list(t->taken);
    free(t->heads);
    free(t->flows);
    free(t);
}

static bool place(struct mover *m, struct table *t) {
    uint32_t number = 0;
    while (number < m->room && m->tables[number])
        number++;
    if (number == m->room) {
        uint32_t room = m->room ? m->room * 2 : 8;
        struct table **tables = realloc(m->tables, room * sizeof *tables);
        if (!tables)
            return false;
        memset(tables + m->room, 0, (room - m->room) * sizeof *tables);
        m->tables = tables;
        m->room = room;
    }
    t->number = number;
    m->tables[number] = t;
    return true;
}

/* Make a table for the listening socket `fd`; raw4 and raw6 send answers to captured datagrams, -1 for none. */
EXPORT struct table *gostnet_udp_open(struct mover *m, int fd, int v6, int flags, int raw4, int raw6) {
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    *t = (struct table){.mover = m, .fd = fd, .v6 = v6, .captured = flags & CAPTURED, .pinned = flags & PINNED};
    t->raw[0] = raw4;
    t->raw[1] = raw6;
    t->free = t->ready_first = t->ready_last = t->moved_first = -1;
    if (getrandom(&t->seed, sizeof t->seed, GRND_NONBLOCK) != sizeof t->seed)
        t->seed = (uint32_t)(uintptr_t)t;
    enter(m);
    bool placed = grow(t) && place(m, t);
    leave(m);
    if (!placed) {
        free(t->heads);
        free(t->flows);
        free(t);
        return NULL;
    }
    t->joins = set(fd, UDP_GRO, 1);
    return t;
}

static void note_moved(struct table *t, int32_t slot) {
    struct flow *flow = &t->flows[slot];
    if (flow->moved)
        return;
    flow->moved = true;
    flow->moved_next = t->moved_first;
    t->moved_first = slot;
    tell(t->mover, COUNTS);
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Send up what has waited for a flow that is joined at last. */
static void send_waiting(struct table *t, struct flow *flow) {
    struct waiting **at = &t->first, *last = NULL;
    while (*at) {
        struct waiting *item = *at;
        if (item->arrival.slot >= 0 || memcmp(&item->arrival.key, &flow->key, sizeof flow->key)) {
            last = item;
            at = &item->next;
            continue;
        }
        uint32_t size = item->arrival.size, step = item->arrival.stride ? item->arrival.stride : size, done = 0;
        do {
            uint32_t part = size - done < step ? size - done : step;
            ssize_t sent = -1;
            for (int i = 0; i < RETRIES && sent < 0; i++) {
                sent = send(flow->upstream, item->data + done, part, MSG_DONTWAIT);
                if (sent < 0 && errno == ECONNREFUSED)
                    flow->count.error = ECONNREFUSED;
                else if (sent < 0 && errno != EINTR)
                    break;
            }
            if (sent >= 0) {
                flow->count.up++;
                flow->count.up_bytes += part;
            } else
                flow->count.dropped++;
            done += part;
        } while (done < size);
        t->waiting--;
        t->waiting_bytes -= size;
        *at = item->next;
        free(item);
        flow->count.at = now();
    }
    t->last = last;
}

static bool watch(struct table *t, int fd, uint32_t what) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = (uint64_t)t->number << 32 | what};
    return !epoll_ctl(t->mover->epoll, EPOLL_CTL_ADD, fd, &event);
}

/* Join a peer with a connected socket; return the slot of the flow, -1 if there is no memory or no such socket. The
 * mover reads the listening socket from now on. */
EXPORT int gostnet_udp_join(struct table *t, const struct key *key, int upstream) {
    uint16_t cuts = set(upstream, UDP_SEGMENT, 0) ? 65535 : 0;
    set(upstream, UDP_GRO, 1);
    enter(t->mover);
    if (!cuts)
        t->mover->refused = ENOPROTOOPT;
    int32_t slot = -1;
    if (find(t, key) >= 0 || (t->free < 0 && !grow(t)) || (!t->watched && !watch(t, t->fd, LISTENING)))
        goto out;
    t->watched = true;
    if (!watch(t, upstream, (uint32_t)t->free))
        goto out;
    slot = t->free;
    struct flow *flow = &t->flows[slot];
    bool moved = flow->moved; /* the slot's last owner has moved something and is gone: it is in the list still */
    int32_t moved_next = flow->moved_next;
    t->free = flow->next;
    uint32_t hash = hash_of(t, key);
    *flow = (struct flow){
        .key = *key,
        .hash = hash,
        .next = t->heads[hash & (t->buckets - 1)],
        .ready_next = -1,
        .moved = moved,
        .moved_next = moved_next,
        .upstream = upstream,
        .cuts_up = cuts,
        .cuts_down = cuts,
        .count = {.slot = slot},
    };
    t->heads[hash & (t->buckets - 1)] = slot;
    t->count++;
    if (t->waiting) {
        send_waiting(t, flow);
        if (flow->count.at)
            note_moved(t, slot);
    }
out:
    leave(t->mover);
    return slot;
}

static void release(struct table *t, int32_t slot) {
    t->flows[slot].dead = false;
    t->flows[slot].next = t->free;
    t->free = slot;
}

static void forget_left(struct table *t, int32_t slot) {
    struct waiting **at = &t->first, *last = NULL;
    while (*at) {
        struct waiting *item = *at;
        if (item->arrival.slot != slot) {
            last = item;
            at = &item->next;
            continue;
        }
        t->waiting--;
        t->waiting_bytes -= item->arrival.size;
        *at = item->next;
        free(item);
    }
    t->last = last;
}

/* Take a flow apart: its descriptor is not looked at any more. `told` is what it has moved since it was told last. After
 * the last one the listening socket is the caller's again. */
EXPORT void gostnet_udp_part(struct table *t, int slot, struct count *told) {
    struct mover *m = t->mover;
    enter(m);
    struct flow *flow = &t->flows[slot];
    *told = flow->count;
    if (flow->upstream >= 0) {
        epoll_ctl(m->epoll, EPOLL_CTL_DEL, flow->upstream, NULL);
        flow->upstream = -1;
        flow->count = (struct count){.slot = slot};
        if (flow->held)
            forget_left(t, slot);
        flow->held = false;
        int32_t *at = &t->heads[flow->hash & (t->buckets - 1)];
        while (*at != slot)
            at = &t->flows[*at].next;
        *at = flow->next;
        t->count--;
        if (flow->ready)
            flow->dead = true; /* its slot is free once it has left the list */
        else
            release(t, slot);
        if (!t->count && t->watched) {
            epoll_ctl(m->epoll, EPOLL_CTL_DEL, t->fd, NULL);
            t->watched = t->readable = false;
        }
    }
    leave(m);
}

/* Keep a datagram for the caller; false if too many wait, so that it is dropped. */
static bool keep(struct table *t, const struct key *key, const uint8_t *data, uint32_t size, uint32_t stride, int slot) {
    struct waiting *item = NULL;
    if (t->waiting < WAITING && t->waiting_bytes + size <= WAITING_BYTES)
        item = malloc(sizeof *item + size);
    if (!item) {
        t->dropped++;
        return false;
    }
    item->next = NULL;
    item->arrival = (struct arrival){*key, size, stride, slot, item->data};
    memcpy(item->data, data, size);
    if (t->first)
        t->last->next = item;
    else
        t->first = item;
    t->last = item;
    t->waiting++;
    t->waiting_bytes += size;
    return true;
}

/* ---- in --------------------------------------------------------------------------------------------------------- */
static int receive_single(int fd, struct mmsghdr *headers, int room) {
    int count = 0;
    for (; count < room; count++) {
        ssize_t size = recvmsg(fd, &headers[count].msg_hdr, MSG_DONTWAIT);
        if (size < 0)
            break;
        headers[count].msg_len = (unsigned)size;
    }
    return count ? count : -1;
}

/* Receive up to `room` messages into the places from `at` on. */
static int receive(struct mover *m, int fd, int at, int room) {
    for (; m->used > at; m->used--) {
        int i = m->used - 1;
        m->in_iov[i] = (struct iovec){m->data + (size_t)i * SLOT, SLOT};
        m->in[i].msg_hdr = (struct msghdr){
            .msg_name = &m->in_names[i],
            .msg_namelen = sizeof m->in_names[i],
            .msg_iov = &m->in_iov[i],
            .msg_iovlen = 1,
            .msg_control = m->in_control[i],
            .msg_controllen = CONTROL,
        };
    }
    int count = m->single ? -1 : recvmmsg(fd, m->in + at, (unsigned)room, MSG_DONTWAIT, NULL);
    if (m->single || (count < 0 && errno == ENOSYS)) {
        m->single = true;
        count = receive_single(fd, m->in + at, room);
    }
    m->used = at + (count > 0 ? count : 0);
    return count;
}

static void map4(uint8_t *into, const void *address) {
    memset(into, 0, 10);
    into[10] = into[11] = 0xff;
    memcpy(into + 12, address, 4);
}

static bool is_v4(const uint8_t *address) {
    static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};
    return !memcmp(address, prefix, 12);
}

static bool is_multicast(const uint8_t *address) {
    return is_v4(address) ? address[12] >= 224 : address[0] == 0xff;
}

static bool is_link_local(const uint8_t *address) { return address[0] == 0xfe && (address[1] & 0xc0) == 0x80; }

/* Read size and stride of a received message, and its key, unless that is NULL; false if it has to be left alone. */
static bool parse(struct table *t, int i, struct key *key) {
    struct mover *m = t->mover;
    struct message *message = &m->messages[i];
    struct msghdr *header = &m->in[i].msg_hdr;
    *message = (struct message){.flow = -1, .next = -1, .size = m->in[i].msg_len};
    bool told = false;
    if (key) {
        memset(key, 0, sizeof *key);
        const union name *name = &m->in_names[i];
        if (name->any.sa_family == AF_INET) {
            map4(key->peer, &name->v4.sin_addr);
            key->port = name->v4.sin_port;
        } else if (name->any.sa_family == AF_INET6) {
            memcpy(key->peer, &name->v6.sin6_addr, 16);
            key->port = name->v6.sin6_port;
            key->zone = name->v6.sin6_scope_id;
        } else
            return false;
    }
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
        const uint8_t *data = CMSG_DATA(c);
        if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
            int stride;
            memcpy(&stride, data, sizeof stride);
            if (stride > 0 && (uint32_t)stride < message->size)
                message->stride = (uint16_t)stride;
        } else if (!key) {
            continue;
        } else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_ORIGINAL && t->captured) {
            struct sockaddr_in name;
            memcpy(&name, data, sizeof name);
            map4(key->local, &name.sin_addr);
            key->local_port = name.sin_port;
            told = true;
        } else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_ORIGINAL && t->captured) {
            struct sockaddr_in6 name;
            memcpy(&name, data, sizeof name);
            memcpy(key->local, &name.sin6_addr, 16);
            key->local_port = name.sin6_port;
            told = true;
        } else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO && t->pinned) {
            struct in_pktinfo info;
            memcpy(&info, data, sizeof info);
            map4(key->local, &info.ipi_spec_dst);
        } else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO && t->pinned) {
            struct in6_pktinfo info;
            memcpy(&info, data, sizeof info);
            if (!is_multicast((const uint8_t *)&info.ipi6_addr)) {
                memcpy(key->local, &info.ipi6_addr, 16);
                if (is_link_local(key->local))
                    key->local_zone = info.ipi6_ifindex;
            }
        }
    }
    return told || !t->captured || !key;
}

/* ---- out -------------------------------------------------------------------------------------------------------- */
static bool full(int error) { return error == EAGAIN || error == ENOBUFS || error == ENOMEM; }

/* Send one datagram of a train that could not be sent as such, or one whose source is no address of ours any more. */
static void send_alone(struct mover *m, struct msghdr header, struct sent *sent, void *data, size_t size) {
    struct iovec iov = {data, size};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    for (int i = 0; i < RETRIES; i++) {
        if (sendmsg(m->out_fd, &header, MSG_DONTWAIT) >= 0) {
            sent->run->packets++;
            sent->run->bytes += (int64_t)size;
            return;
        }
        if (errno == ECONNREFUSED)
            sent->run->error = ECONNREFUSED;
        else if (errno != EINTR) {
            if (full(errno) || !header.msg_controllen)
                break;
            header.msg_control = NULL; /* better from another address than not at all */
            header.msg_controllen = 0;
        }
    }
    sent->run->dropped++;
}

/* Send what a header holds, datagram by datagram. */
static void send_apart(struct mover *m, int i) {
    struct sent *sent = &m->sent[i];
    struct msghdr header = m->out[i].msg_hdr;
    if (sent->segment) { /* the size is what comes last in the control data */
        header.msg_controllen -= CMSG_SPACE(sizeof(uint16_t));
        if (!header.msg_controllen)
            header.msg_control = NULL;
    }
    for (size_t part = 0; part < header.msg_iovlen; part++) {
        uint8_t *data = header.msg_iov[part].iov_base;
        size_t size = header.msg_iov[part].iov_len;
        do {
            size_t step = sent->segment && sent->segment < size ? sent->segment : size;
            send_alone(m, header, sent, data, step);
            data += step;
            size -= step;
        } while (size);
    }
}

static void drop(struct mover *m, int i) {
    m->sent[i].run->dropped += m->sent[i].packets;
}

static void flush(struct mover *m) {
    int retries = 0;
    for (int at = 0; at < m->pending;) {
        int left = m->pending - at, count;
        if (left > 1 && !m->single)
            count = sendmmsg(m->out_fd, m->out + at, (unsigned)left, MSG_DONTWAIT);
        else /* sendmmsg would let others run before it returns */
            count = sendmsg(m->out_fd, &m->out[at].msg_hdr, MSG_DONTWAIT) < 0 ? -1 : 1;
        if (count > 0) {
            for (; count > 0; count--, at++) {
                m->sent[at].run->packets += m->sent[at].packets;
                m->sent[at].run->bytes += m->sent[at].bytes;
            }
            retries = 0;
            continue;
        }
        int error = errno;
        if (error == ENOSYS && !m->single) {
            m->single = true;
            continue;
        }
        if ((error == EINTR || error == ECONNREFUSED) && retries++ < RETRIES) {
            if (error == ECONNREFUSED) /* of an earlier datagram: this one is still here */
                m->sent[at].run->error = error;
            continue;
        }
        struct sent *sent = &m->sent[at];
        if (full(error)) {
            drop(m, at); /* as a network does that is too busy; the next one may be shorter */
        } else if (sent->segment) {
            /* Longer than the way takes, or it cannot be cut there: alone they may be fragmented. */
            *sent->cuts = error == EMSGSIZE || error == EINVAL ? sent->segment - 1 : 0;
            if (!*sent->cuts)
                m->refused = error;
            send_apart(m, at);
        } else if (m->out[at].msg_hdr.msg_controllen) {
            send_apart(m, at);
        } else
            drop(m, at);
        at++;
        retries = 0;
    }
    m->pending = m->iovs = 0;
}

/* Begin a header towards `fd`; return its number. */
static int begin(struct mover *m, int fd, int iovs, struct run *run, uint16_t *cuts) {
    if (m->pending == BATCH || m->iovs + iovs > 2 * BATCH || (m->pending && m->out_fd != fd))
        flush(m);
    m->out_fd = fd;
    int i = m->pending++;
    m->out[i].msg_hdr = (struct msghdr){.msg_iov = &m->out_iov[m->iovs]};
    m->sent[i] = (struct sent){.run = run, .cuts = cuts};
    return i;
}

static void add(struct mover *m, int i, const void *data, size_t size) {
    m->out_iov[m->iovs++] = (struct iovec){(void *)data, size};
    m->out[i].msg_hdr.msg_iovlen++;
}

static void add_control(struct mover *m, int i, int level, int type, const void *data, size_t size) {
    struct msghdr *header = &m->out[i].msg_hdr;
    struct cmsghdr *c = (struct cmsghdr *)(m->out_control[i] + header->msg_controllen);
    memset(c, 0, CMSG_SPACE(size));
    c->cmsg_level = level;
    c->cmsg_type = type;
    c->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(c), data, size);
    header->msg_control = m->out_control[i];
    header->msg_controllen += CMSG_SPACE(size);
}

/* Address a header to the flow's peer, from the address that the peer has asked. */
static void address(struct table *t, int i, const struct flow *flow) {
    struct mover *m = t->mover;
    const struct key *key = &flow->key;
    union name *name = &m->out_names[i];
    memset(name, 0, sizeof *name);
    struct msghdr *header = &m->out[i].msg_hdr;
    header->msg_name = name;
    static const uint8_t none[16];
    bool pinned = t->pinned && memcmp(key->local, none, 16);
    if (t->v6) {
        name->v6.sin6_family = AF_INET6;
        name->v6.sin6_port = key->port;
        name->v6.sin6_scope_id = key->zone;
        memcpy(&name->v6.sin6_addr, key->peer, 16);
        header->msg_namelen = sizeof name->v6;
        if (pinned) {
            struct in6_pktinfo info = {.ipi6_ifindex = key->local_zone};
            memcpy(&info.ipi6_addr, key->local, 16);
            add_control(m, i, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof info);
        }
    } else {
        name->v4.sin_family = AF_INET;
        name->v4.sin_port = key->port;
        memcpy(&name->v4.sin_addr, key->peer + 12, 4);
        header->msg_namelen = sizeof name->v4;
        if (pinned) {
            struct in_pktinfo info = {0};
            memcpy(&info.ipi_spec_dst, key->local + 12, 4);
            add_control(m, i, IPPROTO_IP, IP_PKTINFO, &info, sizeof info);
        }
    }
}

/* Queue a flow's messages, from `i` on, in as few headers as can be: up by its own socket, down by the listening one. */
static void queue(struct table *t, struct flow *flow, bool up, int i, struct run *run) {
    struct mover *m = t->mover;
    uint16_t *cuts = up ? &flow->cuts_up : &flow->cuts_down;
    while (i >= 0) {
        struct message *message = &m->messages[i];
        uint32_t segment = message->stride ? message->stride : message->size;
        bool train = segment && segment <= *cuts;
        if (message->stride && !train) { /* it came as a train and cannot leave as one */
            for (uint32_t at = 0; at < message->size; at += segment) {
                uint32_t size = message->size - at < segment ? message->size - at : segment;
                int h = begin(m, up ? flow->upstream : t->fd, 1, run, cuts);
                if (!up)
                    address(t, h, flow);
                add(m, h, m->data + (size_t)i * SLOT + at, size);
                m->sent[h].packets = 1;
                m->sent[h].bytes = size;
            }
            i = message->next;
            continue;
        }
        int h = begin(m, up ? flow->upstream : t->fd, BATCH, run, cuts);
        struct sent *sent = &m->sent[h];
        if (!up)
            address(t, h, flow);
        add(m, h, m->data + (size_t)i * SLOT, message->size);
        sent->bytes = message->size;
        sent->packets = message->stride ? (message->size + segment - 1) / segment : 1;
        uint32_t last = message->stride ? message->size % segment : 0; /* a shorter one ends a train */
        i = message->next;
        while (train && !last && i >= 0) {
            struct message *more = &m->messages[i];
            uint32_t packets = more->stride ? (more->size + more->stride - 1u) / more->stride : 1;
            if (!more->size || (more->stride ? more->stride != segment : more->size > segment) ||
                sent->packets + packets > MOST_SEGMENTS || sent->bytes + more->size > LARGEST_TRAIN)
                break;
            add(m, h, m->data + (size_t)i * SLOT, more->size);
            sent->bytes += more->size;
            sent->packets += packets;
            last = more->size % segment;
            i = more->next;
        }
        if (sent->packets > 1) {
            sent->segment = (uint16_t)segment;
            add_control(m, h, IPPROTO_UDP, UDP_SEGMENT, &sent->segment, sizeof sent->segment);
        }
    }
}

static uint64_t sum(const void *data, size_t size, uint64_t total) {
    const uint8_t *at = data;
    for (; size >= 4; at += 4, size -= 4) {
        uint32_t word;
        memcpy(&word, at, 4);
        total += word;
    }
    uint8_t rest[4] = {0};
    memcpy(rest, at, size);
    uint32_t word;
    memcpy(&word, rest, 4);
    return total + word;
}

static uint16_t fold(uint64_t total) {
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    uint16_t result = (uint16_t)~total;
    return result ? result : 0xffff;
}

/* Queue an answer to a captured datagram as an IP packet of our own; false if it takes more than one. */
static bool queue_raw(struct table *t, struct flow *flow, const uint8_t *data, uint32_t size, struct run *run) {
    struct mover *m = t->mover;
    const struct key *key = &flow->key;
    bool v4 = is_v4(key->local);
    if (v4 != is_v4(key->peer) || t->raw[!v4] < 0 || size > 1500 - 48)
        return false;
    int h = begin(m, t->raw[!v4], 2, run, &flow->cuts_down);
    uint8_t *header = m->headers[h], *udp = header + (v4 ? 20 : 40);
    uint16_t length = htons((uint16_t)(8 + size));
    union name *name = &m->out_names[h];
    memset(name, 0, sizeof *name);
    if (v4) {
        uint8_t head[20] = {0x45, [8] = 64, [9] = IPPROTO_UDP}; /* the kernel fills in length, identity and sum */
        uint16_t total = htons((uint16_t)(28 + size));
        memcpy(header, head, 20);
        memcpy(header + 2, &total, 2);
        memcpy(header + 12, key->local + 12, 4);
        memcpy(header + 16, key->peer + 12, 4);
        name->v4.sin_family = AF_INET;
        memcpy(&name->v4.sin_addr, key->peer + 12, 4);
    } else {
        uint8_t head[40] = {0x60, [6] = IPPROTO_UDP, [7] = 64};
        memcpy(header, head, 40);
        memcpy(header + 4, &length, 2);
        memcpy(header + 8, key->local, 16);
        memcpy(header + 24, key->peer, 16);
        name->v6.sin6_family = AF_INET6;
        name->v6.sin6_scope_id = key->zone;
        memcpy(&name->v6.sin6_addr, key->peer, 16);
    }
    memcpy(udp, &key->local_port, 2);
    memcpy(udp + 2, &key->port, 2);
    memcpy(udp + 4, &length, 2);
    memset(udp + 6, 0, 2);
    /* RFC 768, RFC 8200 section 8.1: both addresses, protocol and length, then header and data. */
    uint64_t total = sum(v4 ? header + 12 : header + 8, v4 ? 8 : 32, (uint64_t)htons(IPPROTO_UDP) + length);
    uint16_t check = fold(sum(data, size, sum(udp, 8, total)));
    memcpy(udp + 6, &check, 2);
    m->out[h].msg_hdr.msg_name = name;
    m->out[h].msg_hdr.msg_namelen = v4 ? sizeof name->v4 : sizeof name->v6;
    add(m, h, header, v4 ? 28 : 48);
    add(m, h, data, size);
    m->sent[h].packets = 1;
    m->sent[h].bytes = size;
    return true;
}

/* ---- the two directions ----------------------------------------------------------------------------------------- */
/* Add what a batch has moved to the flows' counts. */
static void settle(struct table *t, int runs, bool up) {
    struct mover *m = t->mover;
    flush(m);
    int64_t at = now();
    for (int i = 0; i < runs; i++) {
        struct run *run = &m->runs[i];
        struct flow *flow = &t->flows[run->slot];
        struct count *count = &flow->count;
        if (!run->packets && !run->dropped && !run->error)
            continue;
        *(up ? &count->up : &count->down) += run->packets;
        *(up ? &count->up_bytes : &count->down_bytes) += run->bytes;
        count->dropped += run->dropped;
        if (run->packets || run->dropped)
            count->at = at;
        note_moved(t, run->slot);
        flow->answered |= !up && run->packets;
        if (run->error && !flow->answered) {
            count->error = run->error;
            tell(m, DECIDE);
        }
    }
}

/* Pass a batch of the listening socket. Return how many there were, less than BATCH if that was all. */
static int pass_up(struct table *t) {
    struct mover *m = t->mover;
    int count = -1, runs = 0;
    for (int i = 0; i < RETRIES && count < 0; i++) {
        count = receive(m, t->fd, 0, BATCH);
        if (count < 0 && errno == EAGAIN)
            return 0;
    }
    int16_t first[BATCH];
    m->serial++;
    for (int i = 0; i < count; i++) {
        struct key key;
        if (!parse(t, i, &key))
            continue;
        struct message *message = &m->messages[i];
        message->flow = t->count ? find(t, &key) : -1;
        if (message->flow < 0) {
            keep(t, &key, m->data + (size_t)i * SLOT, message->size, message->stride, -1);
            continue;
        }
        struct flow *flow = &t->flows[message->flow];
        if (flow->serial != m->serial) {
            flow->serial = m->serial;
            flow->run = (int16_t)runs++;
            m->runs[flow->run] = (struct run){.slot = message->flow};
            first[flow->run] = (int16_t)i;
        } else
            m->messages[flow->last].next = (int16_t)i;
        flow->last = (int16_t)i;
    }
    for (int run = 0; run < runs; run++)
        queue(t, &t->flows[m->runs[run].slot], true, first[run], &m->runs[run]);
    settle(t, runs, true);
    return count < 0 ? 0 : count;
}

static void append(struct table *t, int32_t slot) {
    t->flows[slot].ready = true;
    t->flows[slot].ready_next = -1;
    if (t->ready_last >= 0)
        t->flows[t->ready_last].ready_next = slot;
    else
        t->ready_first = slot;
    t->ready_last = slot;
}

/* Queue the answers of a captured flow, at places `from` to `to`; what takes a raw packet of several fragments is left
 * to the caller, and so is what comes after it. */
static void queue_captured(struct table *t, int32_t slot, int from, int to, struct run *run) {
    struct mover *m = t->mover;
    struct flow *flow = &t->flows[slot];
    for (int i = from; i < to; i++) {
        struct message *message = &m->messages[i];
        const uint8_t *data = m->data + (size_t)i * SLOT;
        uint32_t step = message->stride ? message->stride : message->size, at = 0;
        do {
            uint32_t size = message->size - at < step ? message->size - at : step;
            if (flow->held || !queue_raw(t, flow, data + at, size, run)) {
                flow->held |= keep(t, &flow->key, data + at, message->size - at, message->stride, slot);
                break;
            }
            at += step;
        } while (at < message->size);
    }
    if (flow->held)
        tell(m, DECIDE);
}

/* Pass a batch of connected sockets that have something, each its share. */
static void pass_down(struct table *t) {
    struct mover *m = t->mover;
    int used = 0, runs = 0;
    while (t->ready_first >= 0 && used < BATCH && runs < BATCH) {
        int32_t slot = t->ready_first;
        struct flow *flow = &t->flows[slot];
        t->ready_first = flow->ready_next;
        if (t->ready_first < 0)
            t->ready_last = -1;
        flow->ready = false;
        if (flow->dead) {
            release(t, slot);
            continue;
        }
        if (flow->held)
            continue; /* gostnet_udp_resume puts it back */
        struct run *run = &m->runs[runs++];
        *run = (struct run){.slot = slot};
        int room = BATCH - used < SHARE ? BATCH - used : SHARE, count = -1;
        for (int i = 0; i < RETRIES && count < 0; i++) {
            count = receive(m, flow->upstream, used, room);
            if (count < 0 && errno == EAGAIN)
                break;
            if (count < 0 && errno == ECONNREFUSED)
                run->error = ECONNREFUSED;
        }
        if (count <= 0)
            continue;
        if (count == room)
            append(t, slot);
        for (int i = used; i < used + count; i++) {
            parse(t, i, NULL);
            m->messages[i].next = (int16_t)(i + 1 < used + count ? i + 1 : -1);
        }
        if (t->captured)
            queue_captured(t, slot, used, used + count, run);
        else
            queue(t, flow, false, used, run);
        used += count;
    }
    settle(t, runs, false);
}

/* ---- the caller's side ------------------------------------------------------------------------------------------ */
/* Pass a batch of the listening socket in the caller's thread, as long as the mover does not read it. Return 1 if there
 * may be more; what has come waits for gostnet_udp_news. */
EXPORT int gostnet_udp_up(struct table *t) {
    enter(t->mover);
    bool more = !t->watched && pass_up(t) == BATCH;
    leave(t->mover);
    return more;
}

/* Return which kinds of news there are in the tables; those of `heard` are announced again from now on. */
EXPORT unsigned gostnet_udp_told(struct mover *m, unsigned heard) {
    enter(m);
    unsigned told = m->told;
    m->told &= ~heard;
    leave(m);
    return told;
}

/* Fill in counts of flows that have moved something, and arrivals, which are valid until the next call. `numbers` are how
 * many there are of each, how many arrivals have been dropped, and what the kernel lacks: 1 recvmmsg or sendmmsg, 2
 * UDP_GRO, 4 cutting trains for some way out. */
EXPORT void gostnet_udp_news(struct table *t, struct count *counts, struct arrival *arrivals, int64_t *numbers) {
    enter(t->mover);
    int64_t count = 0;
    while (t->moved_first >= 0 && count < BATCH) {
        struct flow *flow = &t->flows[t->moved_first];
        t->moved_first = flow->moved_next;
        flow->moved = false;
        if (flow->upstream < 0)
            continue;
        counts[count++] = flow->count;
        flow->count = (struct count){.slot = flow->count.slot};
    }
    free_list(t->taken);
    t->taken = t->first;
    int64_t taken = 0;
    struct waiting *last = NULL;
    while (t->first && taken < BATCH) {
        last = t->first;
        arrivals[taken++] = last->arrival;
        t->waiting--;
        t->waiting_bytes -= last->arrival.size;
        t->first = last->next;
    }
    if (last)
        last->next = NULL;
    else
        t->taken = NULL;
    numbers[0] = count;
    numbers[1] = taken;
    numbers[2] = t->dropped;
    numbers[3] = t->mover->single | !t->joins << 1 | !!t->mover->refused << 2;
    t->dropped = 0;
    leave(t->mover);
}

/* Go on with a flow's answers: those that were left to the caller are sent. */
EXPORT void gostnet_udp_resume(struct table *t, int slot) {
    struct mover *m = t->mover;
    enter(m);
    struct flow *flow = &t->flows[slot];
    if (flow->upstream >= 0 && flow->held) {
        flow->held = false;
        if (!flow->ready)
            append(t, slot);
        signal_by(m->wake);
    }
    leave(m);
}

/* ---- the mover -------------------------------------------------------------------------------------------------- */
static void note_events(struct mover *m, const struct epoll_event *events, int count) {
    for (int i = 0; i < count; i++) {
        uint32_t number = (uint32_t)(events[i].data.u64 >> 32), slot = (uint32_t)events[i].data.u64;
        uint64_t woken;
        if (number == UINT32_MAX) {
            (void)!read(m->wake, &woken, sizeof woken);
            continue;
        }
        struct table *t = number < m->room ? m->tables[number] : NULL; /* closed meanwhile, or another one by now */
        if (!t)
            continue;
        if (slot == LISTENING)
            t->readable = t->watched;
        else if (slot < t->size && t->flows[slot].upstream >= 0 && !t->flows[slot].ready)
            append(t, (int32_t)slot);
    }
}

/* Pass a batch of every table that has something; return whether there may be more. */
static bool pass(struct mover *m) {
    bool more = false;
    for (uint32_t i = 0; i < m->room; i++) {
        struct table *t = m->tables[i];
        if (!t)
            continue;
        if (t->readable) {
            t->readable = pass_up(t) == BATCH;
            if (t->first)
                tell(m, DECIDE);
        }
        if (t->ready_first >= 0)
            pass_down(t);
        more |= t->readable || t->ready_first >= 0;
    }
    return more;
}

static void *move(void *argument) {
    struct mover *m = argument;
    struct epoll_event events[BATCH];
    bool more = false;
    while (!atomic_load(&m->stopping)) {
        int count = epoll_wait(m->epoll, events, BATCH, more ? 0 : -1);
        enter(m);
        note_events(m, events, count);
        more = pass(m);
        leave(m);
        for (int i = 0; more && count < BATCH && i < BUDGET; i++) {
            enter(m);
            more = pass(m);
            leave(m);
        }
        more |= count == BATCH;
    }
    return NULL;
}

/* End the mover, whose tables are closed. */
EXPORT void gostnet_udp_stop(struct mover *m) {
    if (m->running) {
        atomic_store(&m->stopping, true);
        signal_by(m->wake);
        pthread_join(m->thread, NULL);
    }
    if (m->epoll >= 0)
        close(m->epoll);
    if (m->wake >= 0)
        close(m->wake);
    if (m->data != MAP_FAILED)
        munmap(m->data, (size_t)BATCH * SLOT);
    free(m->tables);
    free(m);
}

/* Make what passes datagrams; `news` is an eventfd. Return NULL if that cannot be. */
EXPORT struct mover *gostnet_udp_make(int news) {
    struct mover *m = calloc(1, sizeof *m);
    if (!m)
        return NULL;
    m->news = news;
    m->used = BATCH;
    m->out_fd = -1;
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->turn, NULL);
    m->epoll = epoll_create1(EPOLL_CLOEXEC);
    m->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    m->data = mmap(NULL, (size_t)BATCH * SLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)UINT32_MAX << 32};
    if (m->epoll < 0 || m->wake < 0 || m->data == MAP_FAILED ||
        epoll_ctl(m->epoll, EPOLL_CTL_ADD, m->wake, &event)) {
        gostnet_udp_stop(m);
        return NULL;
    }
    return m;
}

/* Start the thread, unless it runs; return 0, or an errno. */
EXPORT int gostnet_udp_start(struct mover *m) {
    if (m->running)
        return 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's */
    int error = pthread_create(&m->thread, NULL, move, m);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    m->running = !error;
    if (m->running)
        pthread_setname_np(m->thread, "gostnet-udp");
    return error;
}
