/* Joined UDP flows: the peers of one listening socket, each with a connected socket of its own.
 *
 * Python accepts a peer, finds its target and opens the connected socket; then it joins the two (gostnet_udp_join) and
 * is no longer in the way of the datagrams. There is no thread here: Python's loop calls gostnet_udp_up when the
 * listening socket has something and gostnet_udp_down when the epoll set of the table has, one batch per call, and
 * gets back what has moved, flow by flow, and those datagrams that are nobody's yet.
 *
 * A batch is one recvmmsg, or a few of connected sockets, and as few sends as can be: what goes to one flow is sent
 * together, datagrams of one size in a row as a train that the kernel cuts (UDP_SEGMENT); trains that the kernel has
 * joined on the way in (UDP_GRO) stay trains. Payloads stay where they have been received.
 *
 * Answers leave from the address that was asked (IP_PKTINFO), or, for captured datagrams, by a raw socket with the
 * original destination as their source.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
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
};

enum { CAPTURED = 1, PINNED = 2 }; /* answers by raw sockets; answers from the address that was asked */

/* Whom a datagram is from and where it was sent. Addresses of IPv4 as ::ffff:a.b.c.d; ports big endian. */
struct key {
    uint8_t peer[16], local[16];
    uint32_t zone, local_zone;
    uint16_t port, local_port;
};

/* What has moved for one flow in one call; 64 bits each, so that Python reads them as a list of numbers. */
struct run {
    int64_t slot, packets, bytes, dropped, error;
};

/* A datagram, or a train of datagrams of `stride` bytes, that is left to Python: valid until the next call. */
struct arrival {
    struct key key;
    uint32_t size, stride;
    int64_t slot; /* of its flow on the way down, -1 on the way up */
    const void *data;
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
    int upstream;       /* descriptor, Python's to close; -1 if the slot is free */
    uint32_t serial;    /* of the last batch with something of it, and its place in there: */
    int16_t run, last;
    uint16_t cuts_up, cuts_down; /* the longest datagram that may be in a train; 0: no trains */
    bool ready, dead;
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
    int fd, epoll, raw[2];
    bool v6, captured, pinned;
    bool more; /* the epoll set may know of more than is in the list of those that are ready */
    uint32_t seed, serial, buckets, count, size;
    int32_t free, ready_first, ready_last;
    int32_t *heads;
    struct flow *flows;
    uint8_t *data;
    struct mmsghdr in[BATCH], out[BATCH];
    struct iovec in_iov[BATCH], out_iov[2 * BATCH];
    union name in_names[BATCH], out_names[BATCH];
    char in_control[BATCH][CONTROL] __attribute__((aligned(8)));
    char out_control[BATCH][CONTROL] __attribute__((aligned(8)));
    uint8_t headers[BATCH][48];
    struct message messages[BATCH];
    struct sent sent[BATCH];
    int used;        /* received headers that need to be set up again */
    int out_fd, pending, iovs;
};

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

EXPORT void gostnet_udp_close(struct table *t) {
    if (!t)
        return;
    if (t->epoll >= 0)
        close(t->epoll);
    if (t->data && t->data != MAP_FAILED)
        munmap(t->data, (size_t)BATCH * SLOT);
    free(t->heads);
    free(t->flows);
    free(t);
}

static bool set(int fd, int option, int value) { return !setsockopt(fd, IPPROTO_UDP, option, &value, sizeof value); }

/* Make a table for the listening socket `fd`; raw4 and raw6 send answers to captured datagrams, -1 for none. */
EXPORT struct table *gostnet_udp_open(int fd, int v6, int flags, int raw4, int raw6) {
    struct table *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->fd = fd;
    t->v6 = v6;
    t->captured = flags & CAPTURED;
    t->pinned = flags & PINNED;
    t->raw[0] = raw4;
    t->raw[1] = raw6;
    t->free = t->ready_first = t->ready_last = -1;
    t->used = BATCH;
    t->out_fd = -1;
    if (getrandom(&t->seed, sizeof t->seed, GRND_NONBLOCK) != sizeof t->seed)
        t->seed = (uint32_t)(uintptr_t)t;
    t->epoll = epoll_create1(EPOLL_CLOEXEC);
    t->data = mmap(NULL, (size_t)BATCH * SLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (t->epoll < 0 || t->data == MAP_FAILED || !grow(t)) {
        gostnet_udp_close(t);
        return NULL;
    }
    set(fd, UDP_GRO, 1);
    return t;
}

/* The descriptor that is readable when gostnet_udp_down has something to do. */
EXPORT int gostnet_udp_descriptor(struct table *t) { return t->epoll; }

/* Join a peer with a connected socket; return the slot of the flow, -1 if there is no memory or no such socket. */
EXPORT int gostnet_udp_join(struct table *t, const struct key *key, int upstream) {
    if (find(t, key) >= 0 || (t->free < 0 && !grow(t)))
        return -1;
    int32_t slot = t->free;
    struct flow *flow = &t->flows[slot];
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u32 = (uint32_t)slot};
    if (epoll_ctl(t->epoll, EPOLL_CTL_ADD, upstream, &event))
        return -1;
    t->free = flow->next;
    uint32_t hash = hash_of(t, key);
    uint16_t cuts = set(upstream, UDP_SEGMENT, 0) ? 65535 : 0;
    set(upstream, UDP_GRO, 1);
    *flow = (struct flow){
        .key = *key,
        .hash = hash,
        .next = t->heads[hash & (t->buckets - 1)],
        .ready_next = -1,
        .upstream = upstream,
        .cuts_up = cuts,
        .cuts_down = cuts,
    };
    t->heads[hash & (t->buckets - 1)] = slot;
    t->count++;
    return slot;
}

static void release(struct table *t, int32_t slot) {
    t->flows[slot].dead = false;
    t->flows[slot].next = t->free;
    t->free = slot;
}

/* Take a flow apart: its descriptor is not looked at any more. */
EXPORT void gostnet_udp_part(struct table *t, int slot) {
    struct flow *flow = &t->flows[slot];
    if (flow->upstream < 0)
        return;
    epoll_ctl(t->epoll, EPOLL_CTL_DEL, flow->upstream, NULL);
    flow->upstream = -1;
    int32_t *at = &t->heads[flow->hash & (t->buckets - 1)];
    while (*at != slot)
        at = &t->flows[*at].next;
    *at = flow->next;
    t->count--;
    if (flow->ready)
        flow->dead = true; /* its slot is free once it has left the list */
    else
        release(t, slot);
}

/* ---- in --------------------------------------------------------------------------------------------------------- */
static int receive(struct table *t, int fd, int at, int room) {
    for (int i = at; i < at + room; i++) {
        t->in_iov[i] = (struct iovec){t->data + (size_t)i * SLOT, SLOT};
        t->in[i].msg_hdr = (struct msghdr){
            .msg_name = &t->in_names[i],
            .msg_namelen = sizeof t->in_names[i],
            .msg_iov = &t->in_iov[i],
            .msg_iovlen = 1,
            .msg_control = t->in_control[i],
            .msg_controllen = CONTROL,
        };
        if (fd == t->fd && i - at >= t->used)
            break; /* set up before and not used since */
    }
    int count = recvmmsg(fd, t->in + at, (unsigned)room, MSG_DONTWAIT, NULL);
    t->used = fd == t->fd ? (count > 0 ? count : 0) : BATCH;
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
    struct message *message = &t->messages[i];
    struct msghdr *header = &t->in[i].msg_hdr;
    *message = (struct message){.flow = -1, .next = -1, .size = t->in[i].msg_len};
    bool told = false;
    if (key) {
        memset(key, 0, sizeof *key);
        const union name *name = &t->in_names[i];
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
static void send_alone(struct table *t, struct msghdr header, struct sent *sent, void *data, size_t size) {
    struct iovec iov = {data, size};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    for (int i = 0; i < RETRIES; i++) {
        if (sendmsg(t->out_fd, &header, MSG_DONTWAIT) >= 0) {
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
static void send_apart(struct table *t, int i) {
    struct sent *sent = &t->sent[i];
    struct msghdr header = t->out[i].msg_hdr;
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
            send_alone(t, header, sent, data, step);
            data += step;
            size -= step;
        } while (size);
    }
}

static void drop(struct table *t, int i) {
    t->sent[i].run->dropped += t->sent[i].packets;
}

static void flush(struct table *t) {
    int retries = 0;
    for (int at = 0; at < t->pending;) {
        int count = sendmmsg(t->out_fd, t->out + at, (unsigned)(t->pending - at), MSG_DONTWAIT);
        if (count > 0) {
            for (; count > 0; count--, at++) {
                t->sent[at].run->packets += t->sent[at].packets;
                t->sent[at].run->bytes += t->sent[at].bytes;
            }
            retries = 0;
            continue;
        }
        int error = errno;
        if ((error == EINTR || error == ECONNREFUSED) && retries++ < RETRIES) {
            if (error == ECONNREFUSED) /* of an earlier datagram: this one is still here */
                t->sent[at].run->error = error;
            continue;
        }
        struct sent *sent = &t->sent[at];
        if (full(error)) {
            drop(t, at); /* as a network does that is too busy; the next one may be shorter */
        } else if (sent->segment) {
            /* Longer than the way takes, or it cannot be cut there: alone they may be fragmented. */
            *sent->cuts = error == EMSGSIZE || error == EINVAL ? sent->segment - 1 : 0;
            send_apart(t, at);
        } else if (t->out[at].msg_hdr.msg_controllen) {
            send_apart(t, at);
        } else
            drop(t, at);
        at++;
        retries = 0;
    }
    t->pending = t->iovs = 0;
}

/* Begin a header towards `fd`; return its number. */
static int begin(struct table *t, int fd, int iovs, struct run *run, uint16_t *cuts) {
    if (t->pending == BATCH || t->iovs + iovs > 2 * BATCH || (t->pending && t->out_fd != fd))
        flush(t);
    t->out_fd = fd;
    int i = t->pending++;
    t->out[i].msg_hdr = (struct msghdr){.msg_iov = &t->out_iov[t->iovs]};
    t->sent[i] = (struct sent){.run = run, .cuts = cuts};
    return i;
}

static void add(struct table *t, int i, const void *data, size_t size) {
    t->out_iov[t->iovs++] = (struct iovec){(void *)data, size};
    t->out[i].msg_hdr.msg_iovlen++;
}

static void add_control(struct table *t, int i, int level, int type, const void *data, size_t size) {
    struct msghdr *header = &t->out[i].msg_hdr;
    struct cmsghdr *c = (struct cmsghdr *)(t->out_control[i] + header->msg_controllen);
    memset(c, 0, CMSG_SPACE(size));
    c->cmsg_level = level;
    c->cmsg_type = type;
    c->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(c), data, size);
    header->msg_control = t->out_control[i];
    header->msg_controllen += CMSG_SPACE(size);
}

/* Address a header to the flow's peer, from the address that the peer has asked. */
static void address(struct table *t, int i, const struct flow *flow) {
    const struct key *key = &flow->key;
    union name *name = &t->out_names[i];
    memset(name, 0, sizeof *name);
    struct msghdr *header = &t->out[i].msg_hdr;
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
            add_control(t, i, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof info);
        }
    } else {
        name->v4.sin_family = AF_INET;
        name->v4.sin_port = key->port;
        memcpy(&name->v4.sin_addr, key->peer + 12, 4);
        header->msg_namelen = sizeof name->v4;
        if (pinned) {
            struct in_pktinfo info = {0};
            memcpy(&info.ipi_spec_dst, key->local + 12, 4);
            add_control(t, i, IPPROTO_IP, IP_PKTINFO, &info, sizeof info);
        }
    }
}

/* Queue a flow's messages, from `i` on, in as few headers as can be: up by its own socket, down by the listening one. */
static void queue(struct table *t, struct flow *flow, bool up, int i, struct run *run) {
    uint16_t *cuts = up ? &flow->cuts_up : &flow->cuts_down;
    while (i >= 0) {
        struct message *message = &t->messages[i];
        uint32_t segment = message->stride ? message->stride : message->size;
        bool train = segment && segment <= *cuts;
        if (message->stride && !train) { /* it came as a train and cannot leave as one */
            for (uint32_t at = 0; at < message->size; at += segment) {
                uint32_t size = message->size - at < segment ? message->size - at : segment;
                int h = begin(t, up ? flow->upstream : t->fd, 1, run, cuts);
                if (!up)
                    address(t, h, flow);
                add(t, h, t->data + (size_t)i * SLOT + at, size);
                t->sent[h].packets = 1;
                t->sent[h].bytes = size;
            }
            i = message->next;
            continue;
        }
        int h = begin(t, up ? flow->upstream : t->fd, BATCH, run, cuts);
        struct sent *sent = &t->sent[h];
        if (!up)
            address(t, h, flow);
        add(t, h, t->data + (size_t)i * SLOT, message->size);
        sent->bytes = message->size;
        sent->packets = message->stride ? (message->size + segment - 1) / segment : 1;
        uint32_t last = message->stride ? message->size % segment : 0; /* a shorter one ends a train */
        i = message->next;
        while (train && !last && i >= 0) {
            struct message *more = &t->messages[i];
            uint32_t packets = more->stride ? (more->size + more->stride - 1u) / more->stride : 1;
            if (!more->size || (more->stride ? more->stride != segment : more->size > segment) ||
                sent->packets + packets > MOST_SEGMENTS || sent->bytes + more->size > LARGEST_TRAIN)
                break;
            add(t, h, t->data + (size_t)i * SLOT, more->size);
            sent->bytes += more->size;
            sent->packets += packets;
            last = more->size % segment;
            i = more->next;
        }
        if (sent->packets > 1) {
            sent->segment = (uint16_t)segment;
            add_control(t, h, IPPROTO_UDP, UDP_SEGMENT, &sent->segment, sizeof sent->segment);
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
    const struct key *key = &flow->key;
    bool v4 = is_v4(key->local);
    if (v4 != is_v4(key->peer) || t->raw[!v4] < 0 || size > 1500 - 48)
        return false;
    int h = begin(t, t->raw[!v4], 2, run, &flow->cuts_down);
    uint8_t *header = t->headers[h], *udp = header + (v4 ? 20 : 40);
    uint16_t length = htons((uint16_t)(8 + size));
    union name *name = &t->out_names[h];
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
    t->out[h].msg_hdr.msg_name = name;
    t->out[h].msg_hdr.msg_namelen = v4 ? sizeof name->v4 : sizeof name->v6;
    add(t, h, header, v4 ? 28 : 48);
    add(t, h, data, size);
    t->sent[h].packets = 1;
    t->sent[h].bytes = size;
    return true;
}

/* ---- the two directions ----------------------------------------------------------------------------------------- */
/* Receive a batch of the listening socket. Return how many there were, less than BATCH if that was all; counts[0] runs
 * are filled, and counts[1] arrivals that belong to no flow. */
EXPORT int gostnet_udp_up(struct table *t, struct run *runs, struct arrival *arrivals, int32_t *counts) {
    counts[0] = counts[1] = 0;
    int count = -1;
    for (int i = 0; i < RETRIES && count < 0; i++) {
        count = receive(t, t->fd, 0, BATCH);
        if (count < 0 && errno == EAGAIN)
            return 0;
    }
    int16_t first[BATCH];
    t->serial++;
    for (int i = 0; i < count; i++) {
        struct key key;
        if (!parse(t, i, &key))
            continue;
        struct message *message = &t->messages[i];
        message->flow = find(t, &key);
        if (message->flow < 0) {
            arrivals[counts[1]++] = (struct arrival){
                key, message->size, message->stride, -1, t->data + (size_t)i * SLOT};
            continue;
        }
        struct flow *flow = &t->flows[message->flow];
        if (flow->serial != t->serial) {
            flow->serial = t->serial;
            flow->run = (int16_t)counts[0]++;
            runs[flow->run] = (struct run){.slot = message->flow};
            first[flow->run] = (int16_t)i;
        } else
            t->messages[flow->last].next = (int16_t)i;
        flow->last = (int16_t)i;
    }
    for (int run = 0; run < counts[0]; run++)
        queue(t, &t->flows[runs[run].slot], true, first[run], &runs[run]);
    flush(t);
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

/* Receive a batch of connected sockets that have something, each its share. Return 1 if there may be more; counts[0]
 * runs are filled, and counts[1] arrivals, which are answers that take a raw packet of several fragments. */
EXPORT int gostnet_udp_down(struct table *t, struct run *runs, struct arrival *arrivals, int32_t *counts) {
    counts[0] = counts[1] = 0;
    if (t->ready_first < 0) {
        struct epoll_event events[BATCH];
        int count = epoll_wait(t->epoll, events, BATCH, 0);
        t->more = count == BATCH;
        for (int i = 0; i < count; i++)
            if (!t->flows[events[i].data.u32].ready)
                append(t, (int32_t)events[i].data.u32);
    }
    int used = 0;
    while (t->ready_first >= 0 && used < BATCH && counts[0] < BATCH) {
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
        struct run *run = &runs[counts[0]++];
        *run = (struct run){.slot = slot};
        int room = BATCH - used < SHARE ? BATCH - used : SHARE, count = -1;
        for (int i = 0; i < RETRIES && count < 0; i++) {
            count = receive(t, flow->upstream, used, room);
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
            t->messages[i].next = (int16_t)(i + 1 < used + count ? i + 1 : -1);
        }
        if (!t->captured)
            queue(t, flow, false, used, run);
        else {
            bool behind = false; /* what comes after one that is left stays behind it */
            for (int i = used; i < used + count; i++) {
                struct message *message = &t->messages[i];
                const uint8_t *data = t->data + (size_t)i * SLOT;
                uint32_t step = message->stride ? message->stride : message->size, at = 0;
                do {
                    uint32_t size = message->size - at < step ? message->size - at : step;
                    behind = behind || !queue_raw(t, flow, data + at, size, run);
                    if (behind) {
                        arrivals[counts[1]++] = (struct arrival){
                            flow->key, message->size - at, message->stride, slot, data + at};
                        break;
                    }
                    at += step;
                } while (at < message->size);
            }
        }
        used += count;
    }
    flush(t);
    return t->more || t->ready_first >= 0;
}
