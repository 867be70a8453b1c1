/* The pump between a TUN device and a UDP socket: packets of the device to the peers that have their destinations, what
 * peers send into the device, or to the peer that it is for.
 *
 * Python opens both, takes registrations and decides who is a peer; it tells the addresses of peers
 * (gostnet_tun_learn), and gets back what is not for this file: registrations and their answers, in order
 * (gostnet_tun_take). Both descriptors are duplicates, so it does not matter who closes first.
 *
 * Threads. One thread per pump moves packets. All functions of the interface are called from one other thread. The lock
 * guards the tables, the counters and what is left for Python; the thread never holds it in a system call.
 *
 * Out. The device is read with its virtio header and segmentation offload: a read is a run of TCP segments of up to
 * 64 KiB whose checksums are still to be made. It is cut here, headers anew and payloads where they are, and leaves as
 * trains that the kernel cuts into datagrams (UDP_SEGMENT). A full socket stops the reading of the device, nothing else.
 *
 * In. Datagrams arrive in trains (UDP_GRO). Segments of one TCP flow in a row are joined into one packet, payloads
 * unread: the checksum of the whole follows from those of the segments, so damage stays visible to the receiver.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
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
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

enum {
    VIRTIO = 10,           /* bytes of struct virtio_net_hdr */
    READS = 32,            /* packets of the device in one turn */
    TRAINS = 16,           /* datagrams, or trains, of the socket in one turn */
    SLOT = 65536 + 64,     /* bytes: larger than any packet with its header, a multiple of a cache line */
    OUT = 128,             /* messages before they have to be sent */
    IOVS = 4096,
    HEADERS = 1 << 18,     /* bytes of headers made anew before they have to be sent */
    MOST_HEADER = 256,     /* bytes of IP and TCP headers; with more a run is dropped */
    MOST_PIECES = 2048,    /* segments of one run: 65535 bytes by the least that TCP uses, 48 */
    MOST_SEGMENTS = 64,    /* of a train (UDP_MAX_SEGMENTS up to Linux 6.8), and of a joined run */
    LARGEST_TRAIN = 65000, /* bytes: a datagram less the headers of IPv6 with some extension headers */
    LEFT = 1 << 18,        /* bytes that wait for Python; what does not fit is dropped */
    CACHED = 512,          /* destinations whose peer is remembered */
    RETRIES = 4,           /* of a call that told of an error of an earlier datagram */
    FAILURES = 64,         /* of reads in a row before the pump gives up */
    NARROW = 1,            /* seconds for which trains that do not fit are not tried again */
    FULL_WAIT = 5,         /* milliseconds for room, for datagrams that could not go as a train */
    BUFFER = 1 << 22,      /* bytes of the socket's buffers: the kernel's default holds three trains */
    DRAIN = 4096,          /* packets taken from the device at the end: it may hold runs, which nobody else cuts */
    GOST_SIZE = 20,        /* bytes up to which a datagram is none of ours: it says something to Python, or nothing */
};

enum { SERVER = 1, SINGLE = 2, STRICT = 4 };

enum { NEEDS_CSUM = 1, GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 };

enum { FIN = 0x01, PSH = 0x08, ACK = 0x10, CWR = 0x80 };

struct virtio {
    uint8_t flags, type;
    uint16_t header, segment, start, offset;
};

union name {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* An address inside the tunnel (kind 4 or 6; 0 for the one peer that has all), or a peer's address and port. */
struct key {
    uint8_t kind, bytes[27];
};

struct entry {
    struct key key;
    uint32_t hash;
    int32_t next, value; /* in its chain, or in the free list; the peer's place */
};

struct map {
    struct entry *entries;
    int32_t *heads;
    uint32_t size, count, seed;
    int32_t free;
};

struct counts {
    uint64_t packets[2], bytes[2]; /* 0 up, to the peer; 1 down, from it */
};

struct peer {
    struct key key;
    union name name;
    uint32_t uses, serial; /* addresses that lead to it; of whoever has this place */
    struct counts counts;
    uint16_t narrow;       /* datagrams of this size and more do not leave in trains */
    time_t narrow_until;
    int32_t next_free;
};

struct way { /* a network behind the peer that has `gateway` */
    struct key gateway;
    uint8_t network[16], bits;
};

struct cached {
    struct key key;
    int32_t peer;
    uint32_t generation;
};

/* What a message holds, beside its header. */
struct sent {
    int32_t peer; /* its place, -1 for what the socket is connected to */
    uint32_t serial, bytes;
    uint16_t count, segment;
    bool closed; /* a shorter datagram ends a train */
};

struct queue {
    struct mmsghdr out[OUT];
    struct sent sent[OUT];
    union name names[OUT];
    char control[OUT][CMSG_SPACE(sizeof(uint16_t))] __attribute__((aligned(8)));
    struct iovec iov[IOVS];
    int at, count, iovs;
    bool waits; /* a full socket is waited for, else what does not go at once is dropped */
};

/* A run on its way into the device. */
struct run {
    const uint8_t *first;
    uint32_t size, header, ip, payload, total, count, next;
    uint32_t sum; /* of the payloads */
    int32_t source;
    uint32_t serial;
    uint8_t push;
    struct iovec iov[MOST_SEGMENTS + 2];
};

struct totals {
    uint64_t packets[2], bytes[2], dropped[2], refused, lost, error;
};

struct tun {
    pthread_t thread;
    int device, udp, epoll, wake, news;
    bool v6, server, single, trains;
    atomic_bool stopping, strict;
    pthread_mutex_t lock;
    /* guarded by the lock */
    struct map routes, names;
    struct peer *peers;
    int32_t peers_size, free_peer, any;
    struct way *ways;
    int32_t ways_count;
    struct cached *cache;
    uint32_t generation, serial;
    struct totals totals;
    uint8_t *left;
    size_t left_size;
    /* the thread's */
    uint8_t *up, *down, *headers;
    uint32_t headers_used;
    bool stalled, ended;
    int expected, failures, invalid;
    time_t now, narrow_until; /* as those of a peer, for a connected socket */
    uint16_t narrow;
    struct queue outward, onward;
    struct run run;
    struct mmsghdr in[TRAINS];
    struct iovec in_iov[TRAINS];
    union name in_names[TRAINS];
    char in_control[TRAINS][CMSG_SPACE(sizeof(int)) + 64] __attribute__((aligned(8)));
};

/* What is left for Python: this, the datagram, and bytes up to a multiple of four. Keep in step with tun_pump.py. */
struct left {
    uint32_t size, name_size;
    uint8_t name[28], padding[4];
};

/* ---- tables ----------------------------------------------------------------------------------------------------- */
static uint32_t hash_of(const struct map *map, const struct key *key)
{
    uint64_t hash = map->seed;
    for (size_t i = 0; i < sizeof *key; i += 4) {
        uint32_t word;
        memcpy(&word, (const uint8_t *)key + i, 4);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return (uint32_t)(hash >> 16);
}

static struct entry *map_find(struct map *map, const struct key *key)
{
    if (!map->size)
        return NULL;
    uint32_t hash = hash_of(map, key);
    for (int32_t i = map->heads[hash & (map->size - 1)]; i >= 0; i = map->entries[i].next)
        if (map->entries[i].hash == hash && !memcmp(&map->entries[i].key, key, sizeof *key))
            return &map->entries[i];
    return NULL;
}

static bool map_grow(struct map *map)
{
    uint32_t size = map->size ? map->size * 2 : 16;
    struct entry *entries = realloc(map->entries, size * sizeof *entries);
    if (!entries)
        return false;
    map->entries = entries;
    int32_t *heads = malloc(size * sizeof *heads);
    if (!heads)
        return false;
    for (uint32_t i = 0; i < size; i++)
        heads[i] = -1;
    for (uint32_t i = 0; i < map->size; i++) { /* all are in use, or it would not have to grow */
        entries[i].next = heads[entries[i].hash & (size - 1)];
        heads[entries[i].hash & (size - 1)] = (int32_t)i;
    }
    for (uint32_t i = size; i-- > map->size;) {
        entries[i].next = map->free;
        map->free = (int32_t)i;
    }
    free(map->heads);
    map->heads = heads;
    map->size = size;
    return true;
}

/* Return the entry of a key that is not there yet, NULL without memory. */
static struct entry *map_add(struct map *map, const struct key *key)
{
    if (map->free < 0 && !map_grow(map))
        return NULL;
    int32_t place = map->free;
    struct entry *entry = &map->entries[place];
    map->free = entry->next;
    uint32_t hash = hash_of(map, key);
    int32_t *head = &map->heads[hash & (map->size - 1)];
    *entry = (struct entry){.key = *key, .hash = hash, .next = *head, .value = -1};
    *head = place;
    map->count++;
    return entry;
}

static void map_drop(struct map *map, struct entry *entry)
{
    int32_t place = (int32_t)(entry - map->entries);
    int32_t *at = &map->heads[entry->hash & (map->size - 1)];
    while (*at != place)
        at = &map->entries[*at].next;
    *at = entry->next;
    entry->next = map->free;
    map->free = place;
    map->count--;
}

static struct key address_key(int kind, const uint8_t *address)
{
    struct key key = {.kind = (uint8_t)kind};
    memcpy(key.bytes, address, kind == 6 ? 16 : kind == 4 ? 4 : 0);
    return key;
}

static struct key name_key(const union name *name)
{
    struct key key = {0};
    if (name->any.sa_family == AF_INET) {
        key.kind = 1;
        memcpy(key.bytes, &name->v4.sin_addr, 4);
        memcpy(key.bytes + 16, &name->v4.sin_port, 2);
    } else if (name->any.sa_family == AF_INET6) {
        key.kind = 2;
        memcpy(key.bytes, &name->v6.sin6_addr, 16);
        memcpy(key.bytes + 16, &name->v6.sin6_port, 2);
        memcpy(key.bytes + 20, &name->v6.sin6_scope_id, 4);
    }
    return key;
}

static bool inside(const struct way *way, const uint8_t *address)
{
    unsigned whole = way->bits / 8, rest = way->bits % 8;
    return !memcmp(address, way->network, whole) &&
           (!rest || !((address[whole] ^ way->network[whole]) >> (8 - rest)));
}

/* Return the peer that an address leads to, -1 for none: its own, or that of the longest prefix. With the lock. */
static int32_t peer_of(struct tun *t, int kind, const uint8_t *address)
{
    if (t->single)
        return t->any;
    struct key key = address_key(kind, address);
    struct cached *cached = &t->cache[hash_of(&t->routes, &key) % CACHED];
    if (cached->generation == t->generation && !memcmp(&cached->key, &key, sizeof key))
        return cached->peer;
    struct entry *entry = map_find(&t->routes, &key);
    for (int32_t i = 0; !entry && i < t->ways_count; i++)
        if (t->ways[i].gateway.kind == kind && inside(&t->ways[i], address)) {
            entry = map_find(&t->routes, &t->ways[i].gateway);
            break;
        }
    int32_t peer = entry ? entry->value : -1;
    *cached = (struct cached){key, peer, t->generation};
    return peer;
}

static void release(struct tun *t, int32_t place)
{
    struct peer *peer = &t->peers[place];
    if (--peer->uses)
        return;
    struct entry *entry = map_find(&t->names, &peer->key);
    if (entry)
        map_drop(&t->names, entry);
    peer->next_free = t->free_peer;
    t->free_peer = place;
}

static int32_t peer_at(struct tun *t, const union name *name)
{
    struct key key = name_key(name);
    struct entry *entry = map_find(&t->names, &key);
    if (entry)
        return entry->value;
    if (t->free_peer < 0) {
        int32_t size = t->peers_size ? t->peers_size * 2 : 8;
        struct peer *peers = realloc(t->peers, (size_t)size * sizeof *peers);
        if (!peers)
            return -1;
        t->peers = peers;
        for (int32_t i = size; i-- > t->peers_size;) {
            peers[i].next_free = t->free_peer;
            t->free_peer = i;
        }
        t->peers_size = size;
    }
    entry = map_add(&t->names, &key);
    if (!entry)
        return -1;
    int32_t place = entry->value = t->free_peer;
    struct peer *peer = &t->peers[place];
    t->free_peer = peer->next_free;
    *peer = (struct peer){.key = key, .name = *name, .serial = ++t->serial};
    return place;
}

static bool read_name(union name *name, const void *from, int size)
{
    memset(name, 0, sizeof *name);
    if (size != (int)sizeof name->v4 && size != (int)sizeof name->v6)
        return false;
    memcpy(name, from, (size_t)size);
    return name->any.sa_family == (size == (int)sizeof name->v4 ? AF_INET : AF_INET6);
}

/* Let an address (kind 4 or 6), or all (kind 0), lead to the peer at a sockaddr. Return 0, -1 if that cannot be. */
EXPORT int gostnet_tun_learn(struct tun *t, int kind, const uint8_t *address, const void *sockaddr, int size)
{
    union name name;
    if (!read_name(&name, sockaddr, size))
        return -1;
    struct key key = address_key(kind, address);
    pthread_mutex_lock(&t->lock);
    t->generation++;
    int32_t peer = peer_at(t, &name);
    struct entry *entry = peer < 0 ? NULL : map_find(&t->routes, &key);
    if (peer >= 0 && !entry)
        entry = map_add(&t->routes, &key);
    if (entry) {
        int32_t before = entry->value;
        t->peers[peer].uses++;
        entry->value = peer;
        if (before >= 0)
            release(t, before);
        if (!kind)
            t->any = peer;
    } else if (peer >= 0) {
        t->peers[peer].uses++;
        release(t, peer);
    }
    pthread_mutex_unlock(&t->lock);
    return entry ? 0 : -1;
}

EXPORT void gostnet_tun_forget(struct tun *t, int kind, const uint8_t *address)
{
    struct key key = address_key(kind, address);
    pthread_mutex_lock(&t->lock);
    t->generation++;
    struct entry *entry = map_find(&t->routes, &key);
    if (entry) {
        int32_t peer = entry->value;
        map_drop(&t->routes, entry);
        if (!kind)
            t->any = -1;
        release(t, peer);
    }
    pthread_mutex_unlock(&t->lock);
}

/* Add a network behind the peer that has `gateway`; those with longer prefixes come first. Return 0, -1 if not. */
EXPORT int gostnet_tun_way(struct tun *t, int kind, const uint8_t *network, int bits, const uint8_t *gateway)
{
    pthread_mutex_lock(&t->lock);
    struct way *ways = realloc(t->ways, (size_t)(t->ways_count + 1) * sizeof *ways);
    if (ways) {
        t->ways = ways;
        struct way *way = &ways[t->ways_count++];
        *way = (struct way){.gateway = address_key(kind, gateway), .bits = (uint8_t)bits};
        memcpy(way->network, network, kind == 6 ? 16 : 4);
        t->generation++;
    }
    pthread_mutex_unlock(&t->lock);
    return ways ? 0 : -1;
}

/* ---- sums (RFC 1071), in the host's order ------------------------------------------------------------------------- */
static uint64_t sum(const void *data, size_t size, uint64_t total)
{
    const uint8_t *at = data;
    uint64_t a = 0, b = 0, carry = 0;
    for (; size >= 32; at += 32, size -= 32) {
        uint64_t word[4];
        memcpy(word, at, 32);
        a += word[0];
        carry += a < word[0];
        b += word[1];
        carry += b < word[1];
        a += word[2];
        carry += a < word[2];
        b += word[3];
        carry += b < word[3];
    }
    total += (a & 0xffffffff) + (a >> 32) + (b & 0xffffffff) + (b >> 32) + carry;
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

static uint16_t fold(uint64_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (uint16_t)total;
}

/* Return what goes into a checksum field: 0 would say that there is none. */
static uint16_t closing(uint64_t total)
{
    uint16_t result = (uint16_t)~fold(total);
    return result ? result : 0xffff;
}

static uint16_t get16(const uint8_t *at) { return (uint16_t)(at[0] << 8 | at[1]); }

static uint32_t get32(const uint8_t *at) { return (uint32_t)get16(at) << 16 | get16(at + 2); }

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

static uint16_t raw16(const void *at)
{
    uint16_t value;
    memcpy(&value, at, 2);
    return value;
}

/* ---- counts ------------------------------------------------------------------------------------------------------- */
/* Count what has gone to a peer (way 0) or come from it (1). With the lock. */
static void count_peer(struct tun *t, int way, int32_t peer, uint32_t serial, uint32_t packets, uint64_t bytes)
{
    if (peer >= 0 && peer < t->peers_size && t->peers[peer].serial == serial) {
        t->peers[peer].counts.packets[way] += packets;
        t->peers[peer].counts.bytes[way] += bytes;
    }
}

static void count(struct tun *t, int way, int32_t peer, uint32_t serial, uint32_t packets, uint64_t bytes)
{
    pthread_mutex_lock(&t->lock);
    t->totals.packets[way] += packets;
    t->totals.bytes[way] += bytes;
    count_peer(t, way, peer, serial, packets, bytes);
    pthread_mutex_unlock(&t->lock);
}

/* Count what has been sent: what goes from peer to peer has come down, and is the second one's. */
static void count_sent(struct tun *t, const struct queue *q, const struct sent *sent, uint32_t packets, uint64_t bytes)
{
    if (q == &t->outward) {
        count(t, 0, sent->peer, sent->serial, packets, bytes);
        return;
    }
    count(t, 1, -1, 0, packets, bytes);
    pthread_mutex_lock(&t->lock);
    count_peer(t, 0, sent->peer, sent->serial, packets, bytes);
    pthread_mutex_unlock(&t->lock);
}

static void dropped(struct tun *t, int way, uint32_t packets)
{
    pthread_mutex_lock(&t->lock);
    t->totals.dropped[way] += packets;
    pthread_mutex_unlock(&t->lock);
}

static void end(struct tun *t, int error)
{
    if (t->ended)
        return;
    t->ended = true;
    pthread_mutex_lock(&t->lock);
    t->totals.error = (uint64_t)error;
    pthread_mutex_unlock(&t->lock);
    (void)eventfd_write(t->news, 1);
}

/* ---- out to the socket -------------------------------------------------------------------------------------------- */
static bool is_full(int error) { return error == EAGAIN || error == ENOBUFS || error == ENOMEM; }

static void went(struct tun *t, struct queue *q, int i)
{
    struct sent *sent = &q->sent[i];
    if (sent->count > 1)
        t->invalid = 0;
    count_sent(t, q, sent, sent->count, sent->bytes);
}

/* Send the datagrams of a train one by one. */
static void send_apart(struct tun *t, struct queue *q, int i)
{
    struct sent *sent = &q->sent[i];
    struct msghdr header = q->out[i].msg_hdr;
    header.msg_control = NULL;
    header.msg_controllen = 0;
    const struct iovec *from = header.msg_iov;
    size_t offset = 0;
    uint32_t rest = sent->bytes;
    while (rest) {
        struct iovec iov[4];
        size_t size = sent->segment && sent->segment < rest ? sent->segment : rest, need = size;
        int parts = 0;
        while (need && parts < 4) {
            size_t step = from->iov_len - offset < need ? from->iov_len - offset : need;
            iov[parts++] = (struct iovec){(uint8_t *)from->iov_base + offset, step};
            need -= step;
            offset += step;
            if (offset == from->iov_len) {
                from++;
                offset = 0;
            }
        }
        header.msg_iov = iov;
        header.msg_iovlen = (size_t)parts;
        bool gone = false;
        for (int retry = 0; retry < RETRIES && !gone; retry++) {
            gone = sendmsg(t->udp, &header, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0;
            if (!gone && errno == EAGAIN && q->waits) {
                struct pollfd wait = {.fd = t->udp, .events = POLLOUT};
                (void)poll(&wait, 1, FULL_WAIT);
            } else if (!gone && errno != EINTR && errno != ECONNREFUSED)
                break;
        }
        if (gone)
            count_sent(t, q, sent, 1, size);
        else
            dropped(t, q == &t->outward ? 0 : 1, 1);
        rest -= (uint32_t)size;
    }
}

/* Note that trains of this size do not pass on the way to a peer for now. */
static void too_wide(struct tun *t, const struct sent *sent)
{
    if (sent->peer < 0) {
        t->narrow = sent->segment;
        t->narrow_until = t->now + NARROW;
        return;
    }
    pthread_mutex_lock(&t->lock);
    if (sent->peer < t->peers_size && t->peers[sent->peer].serial == sent->serial) {
        t->peers[sent->peer].narrow = sent->segment;
        t->peers[sent->peer].narrow_until = t->now + NARROW;
    }
    pthread_mutex_unlock(&t->lock);
}

/* Send what is queued; false if the socket is full and the rest waits. */
static bool flush(struct tun *t, struct queue *q)
{
    int retries = 0;
    while (q->at < q->count) {
        int done = sendmmsg(t->udp, q->out + q->at, (unsigned)(q->count - q->at), MSG_DONTWAIT | MSG_NOSIGNAL);
        if (done > 0) {
            for (; done > 0; done--)
                went(t, q, q->at++);
            retries = 0;
            continue;
        }
        int error = errno;
        if (error == ECONNREFUSED) { /* of an earlier datagram: this one is still here */
            pthread_mutex_lock(&t->lock);
            t->totals.refused++;
            pthread_mutex_unlock(&t->lock);
        }
        if ((error == EINTR || error == ECONNREFUSED) && retries++ < RETRIES)
            continue;
        if (error == EAGAIN && q->waits)
            return false;
        struct sent *sent = &q->sent[q->at];
        if (sent->count > 1 && !is_full(error)) {
            /* Longer than the way takes, or it cannot be cut there: alone they may be fragmented. EINVAL said so up to
             * Linux 6.13; it also comes when Python has just switched checksums off, for one datagram of its own. */
            if (error == EMSGSIZE || (error == EINVAL && ++t->invalid > RETRIES))
                too_wide(t, sent);
            send_apart(t, q, q->at);
        } else
            dropped(t, q == &t->outward ? 0 : 1, sent->count);
        q->at++;
        retries = 0;
    }
    q->at = q->count = q->iovs = 0;
    if (q == &t->outward)
        t->headers_used = 0;
    return true;
}

/* Make room for a datagram of `parts` pieces to a peer (-1: what the socket is connected to); false if there is none. */
static bool begin(struct tun *t, struct queue *q, int32_t peer, uint32_t serial, uint32_t size, int parts)
{
    struct sent *last = q->count > q->at ? &q->sent[q->count - 1] : NULL;
    if (last && t->trains && last->peer == peer && last->serial == serial && !last->closed && size <= last->segment &&
        last->count < MOST_SEGMENTS && last->bytes + size <= LARGEST_TRAIN && q->iovs + parts <= IOVS) {
        struct msghdr *header = &q->out[q->count - 1].msg_hdr;
        if (last->count == 1) {
            struct cmsghdr *c = (struct cmsghdr *)q->control[q->count - 1];
            memset(c, 0, sizeof q->control[0]);
            c->cmsg_level = IPPROTO_UDP;
            c->cmsg_type = UDP_SEGMENT;
            c->cmsg_len = CMSG_LEN(sizeof(uint16_t));
            memcpy(CMSG_DATA(c), &last->segment, sizeof(uint16_t));
            header->msg_control = c;
            header->msg_controllen = sizeof q->control[0];
        }
        last->count++;
        last->bytes += size;
        last->closed = size < last->segment;
        return true;
    }
    if ((q->count == OUT || q->iovs + parts > IOVS) && !flush(t, q))
        return false;
    int i = q->count;
    struct msghdr *header = &q->out[i].msg_hdr;
    *header = (struct msghdr){.msg_iov = &q->iov[q->iovs]};
    bool narrow = t->narrow && size >= t->narrow && t->now < t->narrow_until;
    if (peer >= 0) {
        pthread_mutex_lock(&t->lock);
        bool there = peer < t->peers_size && t->peers[peer].serial == serial;
        if (there) {
            q->names[i] = t->peers[peer].name;
            narrow = t->peers[peer].narrow && size >= t->peers[peer].narrow && t->now < t->peers[peer].narrow_until;
        }
        pthread_mutex_unlock(&t->lock);
        if (!there)
            return false;
        header->msg_name = &q->names[i];
        header->msg_namelen = q->names[i].any.sa_family == AF_INET ? sizeof q->names[i].v4 : sizeof q->names[i].v6;
    }
    q->sent[i] = (struct sent){.peer = peer, .serial = serial, .bytes = size, .count = 1, .segment = (uint16_t)size,
                               .closed = narrow};
    q->count++;
    return true;
}

static void add(struct queue *q, const void *data, size_t size)
{
    struct msghdr *header = &q->out[q->count - 1].msg_hdr;
    if (header->msg_iovlen) {
        struct iovec *last = &header->msg_iov[header->msg_iovlen - 1];
        if ((const uint8_t *)last->iov_base + last->iov_len == data) {
            last->iov_len += size;
            return;
        }
    }
    q->iov[q->iovs++] = (struct iovec){(void *)data, size};
    header->msg_iovlen++;
}

/* ---- device to peers ---------------------------------------------------------------------------------------------- */
/* Cut a run of TCP segments, as the kernel would have (tcp_gso_segment): each gets its own length, identification,
 * sequence number and checksums; CWR is on the first only, FIN and PSH on the last. False if it is none. */
static bool cut(struct tun *t, int32_t peer, uint32_t serial, const uint8_t *packet, uint32_t size, struct virtio v)
{
    uint32_t tcp = v.start, version = packet[0] >> 4, type = v.type & ~GSO_ECN;
    if (!(v.flags & NEEDS_CSUM) || v.offset != 16 || !v.segment || tcp + 20 > size)
        return false;
    if (version == 4 ? type != GSO_TCPV4 || tcp < 20 || (packet[0] & 15u) * 4 != tcp
                     : type != GSO_TCPV6 || version != 6 || tcp < 40)
        return false;
    uint32_t header = tcp + (packet[tcp + 12] >> 4) * 4u;
    if (header < tcp + 20 || header > size || header > MOST_HEADER)
        return false;
    uint32_t payload = size - header, pieces = payload ? (payload + v.segment - 1) / v.segment : 1;
    if (pieces > MOST_PIECES || (uint64_t)header * pieces > HEADERS)
        return false;
    uint32_t sequence = get32(packet + tcp + 4), identification = get16(packet + 4);
    uint8_t flags = packet[tcp + 13];
    /* The field holds the sum of the pseudo header, with the length of the whole. */
    uint64_t pseudo = (uint64_t)raw16(packet + tcp + 16) + (uint16_t)~htons((uint16_t)(size - tcp));
    for (uint32_t at = 0, piece = 0; piece < pieces; piece++, at += v.segment) {
        uint32_t length = payload - at < v.segment ? payload - at : v.segment;
        if (t->headers_used + header > HEADERS && !flush(t, &t->outward)) {
            dropped(t, 0, pieces - piece);
            return true;
        }
        /* May flush, and so give the room for headers back. */
        if (!begin(t, &t->outward, peer, serial, header + length, 2)) {
            dropped(t, 0, pieces - piece);
            return true;
        }
        uint8_t *head = t->headers + t->headers_used;
        t->headers_used += (header + 3) & ~3u;
        memcpy(head, packet, header);
        if (version == 4) {
            put16(head + 2, header + length);
            put16(head + 4, identification + piece);
            memset(head + 10, 0, 2);
            uint16_t check = (uint16_t)~fold(sum(head, tcp, 0));
            memcpy(head + 10, &check, 2);
        } else
            put16(head + 4, header + length - 40);
        put32(head + tcp + 4, sequence + at);
        head[tcp + 13] = (uint8_t)(flags & ~((piece ? CWR : 0) | (piece < pieces - 1 ? FIN | PSH : 0)));
        memset(head + tcp + 16, 0, 2);
        uint64_t total = pseudo + htons((uint16_t)(header - tcp + length));
        total = sum(head + tcp, header - tcp, total);
        uint16_t check = closing(sum(packet + header + at, length, total));
        memcpy(head + tcp + 16, &check, 2);
        add(&t->outward, head, header);
        if (length)
            add(&t->outward, packet + header + at, length);
    }
    return true;
}

/* Send one packet of the device, or the segments that it is to be. */
static void send_packet(struct tun *t, uint8_t *packet, uint32_t size, struct virtio v)
{
    int32_t peer = -1;
    uint32_t serial = 0;
    if (t->server) {
        int kind = packet[0] >> 4;
        if (kind == 4 ? size < 20 : kind != 6 || size < 40) {
            dropped(t, 0, 1);
            return;
        }
        pthread_mutex_lock(&t->lock);
        peer = peer_of(t, kind, packet + (kind == 4 ? 16 : 24));
        if (peer >= 0)
            serial = t->peers[peer].serial;
        pthread_mutex_unlock(&t->lock);
        if (peer < 0)
            return; /* nobody has it: no loss of ours */
    }
    if (v.type != GSO_NONE) {
        if (!cut(t, peer, serial, packet, size, v))
            dropped(t, 0, 1);
        return;
    }
    if (v.flags & NEEDS_CSUM) {
        uint32_t field = (uint32_t)v.start + v.offset;
        if (v.start > size || field + 2 > size) {
            dropped(t, 0, 1);
            return;
        }
        uint16_t check = closing(sum(packet + v.start, size - v.start, 0));
        memcpy(packet + field, &check, 2);
    }
    if (begin(t, &t->outward, peer, serial, size, 1))
        add(&t->outward, packet, size);
    else
        dropped(t, 0, 1);
}

static void watch(struct tun *t, bool stalled)
{
    if (t->stalled == stalled)
        return;
    t->stalled = stalled;
    struct epoll_event device = {.events = stalled ? 0 : EPOLLIN, .data.fd = t->device};
    struct epoll_event udp = {.events = EPOLLIN | (stalled ? EPOLLOUT : 0), .data.fd = t->udp};
    if (epoll_ctl(t->epoll, EPOLL_CTL_MOD, t->device, &device) || epoll_ctl(t->epoll, EPOLL_CTL_MOD, t->udp, &udp))
        end(t, errno);
}

/* Read what the device has, as much as came last time, and twice as much next time if that was not all; so a single
 * packet takes no vain read. Return how many packets there were. */
static int device_turn(struct tun *t)
{
    int reads = 0;
    bool full = false;
    while (reads < t->expected && !full) {
        uint8_t *slot = t->up + (size_t)reads * SLOT + 64 - VIRTIO; /* so that packets are aligned */
        ssize_t size = read(t->device, slot, SLOT - 64 + VIRTIO);
        if (size <= 0) {
            if (size < 0 && errno == EINTR)
                continue;
            if (size == 0 || errno == EBADFD || errno == EBADF || errno == ENODEV)
                end(t, size ? errno : ENODEV);
            else if (errno != EAGAIN && ++t->failures > FAILURES)
                end(t, errno);
            break;
        }
        t->failures = 0;
        reads++;
        if (size <= VIRTIO)
            continue;
        struct virtio v;
        memcpy(&v, slot, VIRTIO);
        send_packet(t, slot + VIRTIO, (uint32_t)size - VIRTIO, v);
        /* The next one may need much of both. */
        full = t->outward.iovs > IOVS / 2 || t->headers_used > HEADERS / 2 || t->outward.at;
    }
    if (reads == t->expected)
        t->expected = reads * 2 < READS ? reads * 2 : READS;
    else if (!full)
        t->expected = reads ? reads : 1;
    watch(t, !flush(t, &t->outward));
    return reads;
}

/* ---- peers to device ---------------------------------------------------------------------------------------------- */
static bool write_device(struct tun *t, const struct iovec *iov, int parts, int32_t source, uint32_t serial,
                         uint32_t packets, uint64_t bytes)
{
    ssize_t done;
    do
        done = writev(t->device, iov, parts);
    while (done < 0 && errno == EINTR);
    if (done >= 0) {
        count(t, 1, source, serial, packets, bytes);
        return true;
    }
    if (errno == EBADFD || errno == EBADF || errno == ENODEV)
        end(t, errno);
    return false;
}

static void write_alone(struct tun *t, const uint8_t *packet, uint32_t size, int32_t source, uint32_t serial)
{
    static const uint8_t plain[VIRTIO];
    struct iovec iov[2] = {{(void *)plain, VIRTIO}, {(void *)packet, size}};
    if (!write_device(t, iov, 2, source, serial, 1, size))
        dropped(t, 1, 1);
}

static uint64_t addresses(const uint8_t *packet, uint32_t ip)
{
    return ip == 20 ? sum(packet + 12, 8, 0) : sum(packet + 8, 32, 0);
}

/* Write the run at hand: one packet as it is, or several as one. */
static void finish(struct tun *t)
{
    struct run *run = &t->run;
    uint32_t segments = run->count;
    run->count = 0;
    if (!segments)
        return;
    if (segments == 1) {
        write_alone(t, run->first, run->size, run->source, run->serial);
        return;
    }
    uint8_t head[128];
    uint32_t ip = run->ip, tcp = run->header - ip;
    memcpy(head, run->first, run->header);
    if (ip == 20) {
        put16(head + 2, run->header + run->total);
        memset(head + 10, 0, 2);
        uint16_t check = (uint16_t)~fold(sum(head, 20, 0));
        memcpy(head + 10, &check, 2);
    } else
        put16(head + 4, tcp + run->total);
    head[ip + 13] |= run->push;
    memset(head + ip + 16, 0, 2);
    uint64_t total = addresses(head, ip) + htons(IPPROTO_TCP) + htons((uint16_t)(tcp + run->total)) + run->sum;
    uint16_t check = closing(sum(head + ip, tcp, total));
    memcpy(head + ip + 16, &check, 2);
    struct virtio v = {
        .type = ip == 20 ? GSO_TCPV4 : GSO_TCPV6,
        .header = (uint16_t)run->header,
        .segment = (uint16_t)run->payload,
    };
    run->iov[0] = (struct iovec){&v, VIRTIO};
    run->iov[1] = (struct iovec){head, run->header};
    uint64_t bytes = (uint64_t)segments * run->header + run->total;
    if (write_device(t, run->iov, (int)segments + 2, run->source, run->serial, segments, bytes) || t->ended)
        return;
    if (errno != EINVAL) {
        dropped(t, 1, segments);
        return;
    }
    /* A kernel that does not take it so: each as it has come. Headers stand in front of the payloads. */
    for (uint32_t i = 0; i < segments; i++)
        write_alone(t, (uint8_t *)run->iov[2 + i].iov_base - run->header,
                    (uint32_t)run->iov[2 + i].iov_len + run->header, run->source, run->serial);
}

/* Return the bytes of the headers of a plain segment, 0 for anything else: fragments, options of IPv4, extension
 * headers, anything but ACK and PSH, no payload, a wrong sum of the header. */
static uint32_t header_of(const uint8_t *packet, uint32_t size)
{
    uint32_t ip;
    if (size < 40)
        return 0;
    if (packet[0] == 0x45) {
        if (packet[9] != IPPROTO_TCP || packet[6] != 0x40 || packet[7] || get16(packet + 2) != size ||
            fold(sum(packet, 20, 0)) != 0xffff)
            return 0;
        ip = 20;
    } else if (packet[0] >> 4 == 6) {
        if (size < 60 || packet[6] != IPPROTO_TCP || get16(packet + 4) + 40u != size)
            return 0;
        ip = 40;
    } else
        return 0;
    uint32_t words = packet[ip + 12] >> 4;
    if (words < 5 || (packet[ip + 13] & ~PSH) != ACK || ip + words * 4 >= size)
        return 0;
    return ip + words * 4;
}

/* Return the sum of a segment's payload, as its checksum says: with the headers it adds up to nothing. */
static uint16_t payload_sum(const uint8_t *packet, uint32_t ip, uint32_t header, uint32_t size)
{
    uint64_t total = addresses(packet, ip) + htons(IPPROTO_TCP) + htons((uint16_t)(size - ip));
    return (uint16_t)~fold(sum(packet + ip, header - ip, total));
}

static bool follows(const struct run *run, const uint8_t *packet, uint32_t size, uint32_t header)
{
    const uint8_t *first = run->first;
    uint32_t ip = run->ip, payload = size - header;
    if (header != run->header || packet[0] != first[0] || payload > run->payload ||
        run->header + run->total + payload > 65535 || get32(packet + ip + 4) != run->next)
        return false;
    bool same = ip == 20 ? packet[1] == first[1] && !memcmp(packet + 6, first + 6, 4) &&
                               !memcmp(packet + 12, first + 12, 8)
                         : !memcmp(packet, first, 4) && !memcmp(packet + 6, first + 6, 34);
    packet += ip;
    first += ip;
    return same && !memcmp(packet, first, 4) && !memcmp(packet + 8, first + 8, 5) &&
           ((packet[13] ^ first[13]) & ~PSH) == 0 && !memcmp(packet + 14, first + 14, 2) &&
           !memcmp(packet + 18, first + 18, header - ip - 18);
}

/* Let a packet into the device, in a run with those before and behind it if it is one. */
static void deliver(struct tun *t, const uint8_t *packet, uint32_t size, int32_t source, uint32_t serial)
{
    struct run *run = &t->run;
    uint32_t header = header_of(packet, size);
    if (run->count && (!header || run->source != source || run->serial != serial || !follows(run, packet, size, header)))
        finish(t);
    if (!header) {
        write_alone(t, packet, size, source, serial);
        return;
    }
    uint32_t ip = packet[0] >> 4 == 4 ? 20 : 40, payload = size - header;
    uint8_t push = packet[ip + 13] & PSH;
    if (!run->count) {
        if (push) {
            write_alone(t, packet, size, source, serial);
            return;
        }
        run->first = packet;
        run->size = size;
        run->header = header;
        run->ip = ip;
        run->payload = payload;
        run->total = run->sum = 0;
        run->push = 0;
        run->source = source;
        run->serial = serial;
        run->next = get32(packet + ip + 4);
    }
    uint16_t part = payload_sum(packet, ip, header, size);
    if (run->total & 1) /* it begins at an odd byte of the whole */
        part = (uint16_t)(part << 8 | part >> 8);
    run->sum += part;
    run->iov[2 + run->count++] = (struct iovec){(void *)(packet + header), payload};
    run->total += payload;
    run->next += payload;
    run->push = push;
    if (push || payload < run->payload || run->count == MOST_SEGMENTS)
        finish(t);
}

static void leave(struct tun *t, const uint8_t *data, uint32_t size, const union name *name, uint32_t name_size)
{
    struct left left = {.size = size, .name_size = name_size};
    memcpy(left.name, name, name_size < sizeof left.name ? name_size : sizeof left.name);
    size_t room = sizeof left + ((size + 3) & ~3u);
    pthread_mutex_lock(&t->lock);
    bool first = !t->left_size, fits = t->left_size + room <= LEFT;
    if (fits) {
        memcpy(t->left + t->left_size, &left, sizeof left);
        memcpy(t->left + t->left_size + sizeof left, data, size);
        t->left_size += room;
    } else
        t->totals.lost++;
    pthread_mutex_unlock(&t->lock);
    if (first && fits)
        (void)eventfd_write(t->news, 1);
}

/* What was found for the packet before, which the next one of the same ends needs as well. */
struct ends {
    uint8_t bytes[32];
    int kind;
    bool refused;
    int32_t other;
    uint32_t other_serial;
};

/* Let one datagram go where it belongs. */
static void sort(struct tun *t, const uint8_t *data, uint32_t size, struct ends *ends, int32_t source,
                 uint32_t serial, const struct msghdr *from)
{
    static const uint8_t magic[4] = {'G', 'O', 'S', 'T'};
    if (size <= GOST_SIZE) {
        if (size == GOST_SIZE && !memcmp(data, magic, 4))
            leave(t, data, size, from->msg_name, from->msg_namelen);
        return;
    }
    int kind = data[0] >> 4;
    if (!t->server) {
        if (kind == 4 || kind == 6)
            deliver(t, data, size, -1, 0);
        return;
    }
    if (kind == 4 && !memcmp(data, magic, 4)) {
        leave(t, data, size, from->msg_name, from->msg_namelen);
        return;
    }
    if (kind != 4 && (kind != 6 || size < 40))
        return;
    uint32_t length = kind == 4 ? 4 : 16;
    const uint8_t *pair = data + (kind == 4 ? 12 : 8);
    if (ends->kind != kind || memcmp(ends->bytes, pair, 2 * length)) {
        /* Whose they are is looked up once for packets that follow each other between the same two ends. */
        ends->kind = kind;
        memcpy(ends->bytes, pair, 2 * length);
        pthread_mutex_lock(&t->lock);
        ends->refused = t->strict && (source < 0 || peer_of(t, kind, pair) != source);
        ends->other = t->single ? -1 : peer_of(t, kind, pair + length);
        ends->other_serial = ends->other >= 0 ? t->peers[ends->other].serial : 0;
        pthread_mutex_unlock(&t->lock);
    }
    if (ends->refused) {
        dropped(t, 1, 1);
        return;
    }
    if (ends->other < 0) {
        deliver(t, data, size, source, serial);
        return;
    }
    if (!begin(t, &t->onward, ends->other, ends->other_serial, size, 1)) {
        dropped(t, 1, 1);
        return;
    }
    add(&t->onward, data, size);
    pthread_mutex_lock(&t->lock);
    count_peer(t, 1, source, serial, 1, size);
    pthread_mutex_unlock(&t->lock);
}

static uint32_t stride_of(struct msghdr *header, uint32_t size)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c))
        if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
            int stride;
            memcpy(&stride, CMSG_DATA(c), sizeof stride);
            if (stride > 0 && (uint32_t)stride < size)
                return (uint32_t)stride;
        }
    return size;
}

static void socket_turn(struct tun *t, bool failing)
{
    for (int i = 0; i < TRAINS; i++) {
        t->in_iov[i] = (struct iovec){t->down + (size_t)i * SLOT, SLOT};
        t->in[i].msg_hdr = (struct msghdr){
            .msg_name = &t->in_names[i],
            .msg_namelen = sizeof t->in_names[i],
            .msg_iov = &t->in_iov[i],
            .msg_iovlen = 1,
            .msg_control = t->in_control[i],
            .msg_controllen = sizeof t->in_control[i],
        };
    }
    int got = recvmmsg(t->udp, t->in, TRAINS, MSG_DONTWAIT, NULL);
    if (got < 0) {
        int error = errno;
        if (error == EAGAIN && failing) { /* somebody has asked for the errors of single datagrams */
            struct msghdr nothing = {0};
            (void)recvmsg(t->udp, &nothing, MSG_ERRQUEUE | MSG_DONTWAIT);
        }
        if (error == ECONNREFUSED) {
            pthread_mutex_lock(&t->lock);
            t->totals.refused++;
            pthread_mutex_unlock(&t->lock);
        } else if (error == EBADF || (error != EAGAIN && error != EINTR && ++t->failures > FAILURES))
            end(t, error);
        return;
    }
    t->failures = 0;
    for (int i = 0; i < got; i++) {
        struct msghdr *header = &t->in[i].msg_hdr;
        const uint8_t *data = t->down + (size_t)i * SLOT;
        uint32_t size = t->in[i].msg_len, stride = stride_of(header, size);
        struct ends ends = {.kind = 0};
        int32_t source = -1;
        uint32_t serial = 0;
        if (t->server) {
            struct key key = name_key(&t->in_names[i]);
            pthread_mutex_lock(&t->lock);
            struct entry *entry = map_find(&t->names, &key);
            if (entry) {
                source = entry->value;
                serial = t->peers[source].serial;
            }
            pthread_mutex_unlock(&t->lock);
        }
        for (uint32_t at = 0; at < size; at += stride)
            sort(t, data + at, size - at < stride ? size - at : stride, &ends, source, serial, header);
    }
    finish(t);
    (void)flush(t, &t->onward);
}

/* ---- the thread --------------------------------------------------------------------------------------------------- */
static void *move(void *argument)
{
    struct tun *t = argument;
    while (!t->ended && !atomic_load_explicit(&t->stopping, memory_order_acquire)) {
        struct epoll_event events[3];
        int got = epoll_wait(t->epoll, events, 3, -1);
        if (got < 0 && errno != EINTR)
            end(t, errno);
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
        t->now = now.tv_sec;
        for (int i = 0; i < got && !t->ended; i++) {
            if (events[i].data.fd == t->udp) {
                if (events[i].events & EPOLLOUT && t->stalled)
                    watch(t, !flush(t, &t->outward));
                if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP))
                    socket_turn(t, events[i].events & EPOLLERR);
            } else if (events[i].data.fd == t->device) {
                if (t->stalled) { /* told although it is not asked: the device is gone */
                    t->outward.at = t->outward.count = t->outward.iovs = 0;
                    t->headers_used = 0;
                    watch(t, false);
                }
                (void)device_turn(t);
            }
        }
    }
    /* Whoever reads the device from now on gets packets, not runs: those that wait there are sent, as far as they go. */
    t->outward.waits = false;
    if (!t->ended && (!t->stalled || flush(t, &t->outward)))
        for (int rest = DRAIN, got; rest > 0 && !t->ended && (got = device_turn(t)); rest -= got)
            ;
    return NULL;
}

static void destroy(struct tun *t)
{
    int fds[] = {t->device, t->udp, t->epoll};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    if (t->wake >= 0)
        close(t->wake);
    if (t->up != MAP_FAILED && t->up)
        munmap(t->up, (size_t)(READS + TRAINS) * SLOT + HEADERS);
    free(t->left);
    free(t->cache);
    free(t->ways);
    free(t->peers);
    free(t->routes.entries);
    free(t->routes.heads);
    free(t->names.entries);
    free(t->names.heads);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

static bool option(int fd, int name, int value) { return !setsockopt(fd, IPPROTO_UDP, name, &value, sizeof value); }

/* Enlarge a buffer of the socket, beyond what others may ask for where that is allowed. */
static void enlarge(int fd, int name, int forced)
{
    int size = 0, wanted = BUFFER;
    socklen_t length = sizeof size;
    if (getsockopt(fd, SOL_SOCKET, name, &size, &length) || size >= BUFFER)
        return;
    if (setsockopt(fd, SOL_SOCKET, forced, &wanted, sizeof wanted))
        (void)setsockopt(fd, SOL_SOCKET, name, &wanted, sizeof wanted);
}

/* Make a pump between a device with a virtio header and a UDP socket, both not blocking; NULL, with errno, if that
 * cannot be. `news` is an eventfd of the caller's, which says that there is something to take, or that it has ended.
 * Without SERVER the socket is connected. Nothing moves before gostnet_tun_start. */
EXPORT struct tun *gostnet_tun_open(int device, int udp, int flags, int news)
{
    struct tun *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->server = flags & SERVER;
    t->single = flags & SINGLE;
    t->strict = flags & STRICT;
    t->news = news;
    t->any = t->free_peer = t->routes.free = t->names.free = -1;
    t->generation = 1;
    t->expected = 1;
    t->outward.waits = true;
    pthread_mutex_init(&t->lock, NULL);
    if (getrandom(&t->routes.seed, sizeof t->routes.seed, GRND_NONBLOCK) < 0)
        t->routes.seed = (uint32_t)(uintptr_t)t;
    t->names.seed = t->routes.seed;
    t->device = fcntl(device, F_DUPFD_CLOEXEC, 0);
    t->udp = fcntl(udp, F_DUPFD_CLOEXEC, 0);
    t->epoll = epoll_create1(EPOLL_CLOEXEC);
    t->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    t->left = malloc(LEFT);
    t->cache = calloc(CACHED, sizeof *t->cache);
    t->up = mmap(NULL, (size_t)(READS + TRAINS) * SLOT + HEADERS, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct epoll_event first = {.events = EPOLLIN, .data.fd = t->device};
    struct epoll_event second = {.events = EPOLLIN, .data.fd = t->udp};
    struct epoll_event third = {.events = EPOLLIN, .data.fd = t->wake};
    if (t->device < 0 || t->udp < 0 || t->epoll < 0 || t->wake < 0 || !t->left || !t->cache || t->up == MAP_FAILED ||
        epoll_ctl(t->epoll, EPOLL_CTL_ADD, t->device, &first) || epoll_ctl(t->epoll, EPOLL_CTL_ADD, t->udp, &second) ||
        epoll_ctl(t->epoll, EPOLL_CTL_ADD, t->wake, &third)) {
        int error = errno;
        destroy(t);
        errno = error;
        return NULL;
    }
    t->down = t->up + (size_t)READS * SLOT;
    t->headers = t->down + (size_t)TRAINS * SLOT;
    t->trains = option(udp, UDP_SEGMENT, 0);
    (void)option(udp, UDP_GRO, 1);
    enlarge(udp, SO_RCVBUF, SO_RCVBUFFORCE);
    enlarge(udp, SO_SNDBUF, SO_SNDBUFFORCE);
    return t;
}

/* Start the thread. Return 0 or an errno. */
EXPORT int gostnet_tun_start(struct tun *t)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are Python's */
    int error = pthread_create(&t->thread, NULL, move, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        pthread_setname_np(t->thread, "gostnet-tun");
    return error;
}

/* End the thread, if it has been started. The counts can still be asked for; free it with gostnet_tun_close. */
EXPORT void gostnet_tun_stop(struct tun *t)
{
    if (!t->thread)
        return;
    atomic_store_explicit(&t->stopping, true, memory_order_release);
    (void)eventfd_write(t->wake, 1);
    pthread_join(t->thread, NULL);
    t->thread = 0;
}

EXPORT void gostnet_tun_close(struct tun *t)
{
    gostnet_tun_stop(t);
    destroy(t);
}

/* Say whether packets are taken only from the peer that has their source. */
EXPORT void gostnet_tun_strict(struct tun *t, int strict) { t->strict = strict; }

/* Copy all that is left for Python, at most LEFT bytes; return how many. */
EXPORT int gostnet_tun_take(struct tun *t, void *into)
{
    pthread_mutex_lock(&t->lock);
    size_t size = t->left_size;
    memcpy(into, t->left, size);
    t->left_size = 0;
    pthread_mutex_unlock(&t->lock);
    return (int)size;
}

EXPORT void gostnet_tun_count(struct tun *t, struct totals *totals)
{
    pthread_mutex_lock(&t->lock);
    *totals = t->totals;
    pthread_mutex_unlock(&t->lock);
}

/* Return the counts of the peer at a sockaddr; -1 if there is none. */
EXPORT int gostnet_tun_peer(struct tun *t, const void *sockaddr, int size, struct counts *counts)
{
    union name name;
    if (!read_name(&name, sockaddr, size))
        return -1;
    struct key key = name_key(&name);
    pthread_mutex_lock(&t->lock);
    struct entry *entry = map_find(&t->names, &key);
    if (entry)
        *counts = t->peers[entry->value].counts;
    pthread_mutex_unlock(&t->lock);
    return entry ? 0 : -1;
}
