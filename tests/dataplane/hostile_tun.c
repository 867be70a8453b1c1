/* Throws packets at the pump of tun.c that no kernel and no honest peer would send: `hostile SEED ROUNDS`.
 *
 * Meant for a build with sanitizers, or for valgrind. The device is a pair of sockets; whatever comes out is read and
 * thrown away. At the end a packet has to pass in either direction, so a pump that has stopped is a failure too.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

struct tun;
struct tun *gostnet_tun_open(int, int, int, int);
int gostnet_tun_start(struct tun *), gostnet_tun_take(struct tun *, void *);
int gostnet_tun_learn(struct tun *, int, const uint8_t *, const void *, int);
int gostnet_tun_way(struct tun *, int, const uint8_t *, int, const uint8_t *);
void gostnet_tun_forget(struct tun *, int, const uint8_t *);
void gostnet_tun_close(struct tun *), gostnet_tun_count(struct tun *, void *);

static uint64_t state;

static uint32_t any(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % below;
}

/* A packet that is nearly right, and what stands in front of it. */
static size_t make(uint8_t *at, size_t room)
{
    static const uint8_t lengths[] = {0, 5, 6, 8, 15};
    size_t size = any(4) ? 10 + any(3000) : 10 + any((uint32_t)room - 10);
    for (size_t i = 0; i < 200 && i < size; i++)
        at[i] = any(3) ? 0 : (uint8_t)any(256);
    uint8_t *p = at + 10, tcp = 20;
    if (size < 80)
        return size;
    if (any(2)) {
        uint8_t words = any(4) ? 5 : lengths[any(5)];
        p[0] = (uint8_t)(0x40 | words);
        p[2] = (uint8_t)((size - 10) >> 8);
        p[3] = (uint8_t)(size - 10);
        p[6] = any(4) ? 0x40 : (uint8_t)any(256);
        p[9] = any(8) ? 6 : 17;
        memcpy(p + 12, (uint8_t[]){10, 0, 0, (uint8_t)any(4), 10, 0, 0, (uint8_t)any(4)}, 8);
        tcp = (uint8_t)(words * 4);
        uint32_t sum = 0;
        for (int i = 0; i < 20; i += 2)
            sum += i == 10 ? 0 : (uint32_t)(p[i] << 8 | p[i + 1]);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = ~((sum & 0xffff) + (sum >> 16));
        p[10] = (uint8_t)(sum >> 8);
        p[11] = (uint8_t)sum;
    } else {
        p[0] = 0x60;
        p[4] = (uint8_t)((size - 50) >> 8);
        p[5] = (uint8_t)(size - 50);
        p[6] = any(4) ? 6 : (uint8_t)any(256); /* extension headers */
        tcp = any(4) ? 40 : (uint8_t)(40 + any(30));
        memset(p + 8, 0, 32);
        p[8] = p[24] = 0xfd;
        p[23] = (uint8_t)any(4);
        p[39] = (uint8_t)any(4);
    }
    if (tcp + 14u < size - 10) {
        p[tcp + 12] = any(4) ? 0x50 : (uint8_t)any(256);
        p[tcp + 13] = any(4) ? 0x10 : (uint8_t)any(256);
    }
    uint16_t v[5] = {(uint16_t)((any(4) ? 1 : any(256)) | (any(4) ? (p[0] >> 4 == 4 ? 1 : 4) : any(256)) << 8), 0, 0, 0, 0};
    v[2] = (uint16_t)(any(4) ? 48 + any(1400) : any(65536));
    v[3] = any(4) ? tcp : (uint16_t)any(65536);
    v[4] = any(4) ? 16 : (uint16_t)any(65536);
    memcpy(at, v, 10);
    return size;
}

static void swallow(int fd, uint8_t *into)
{
    while (recv(fd, into, 70000, MSG_DONTWAIT) > 0)
        ;
}

static int passes(int from, int to, const uint8_t *data, size_t size, size_t skip_in, size_t skip_out)
{
    static uint8_t into[70000];
    for (int attempt = 0; attempt < 100; attempt++) { /* what came before it may still fill the way */
        swallow(to, into);
        (void)send(from, data + skip_in, size - skip_in, 0);
        struct pollfd wait = {.fd = to, .events = POLLIN};
        while (poll(&wait, 1, 100) > 0) {
            ssize_t got = recv(to, into, sizeof into, 0);
            if (got == (ssize_t)(size - skip_out) && !memcmp(into, data + skip_out, (size_t)got))
                return 1;
        }
    }
    return 0;
}

static int throw_at(int flags, int rounds)
{
    static uint8_t packet[70000], into[1 << 18];
    int pair[2], news = eventfd(0, EFD_NONBLOCK);
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair))
        return 1;
    int udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0), peer = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in near = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}}, far = near;
    socklen_t size = sizeof near;
    if (bind(udp, (struct sockaddr *)&near, size) || bind(peer, (struct sockaddr *)&far, size) ||
        getsockname(udp, (struct sockaddr *)&near, &size) || getsockname(peer, (struct sockaddr *)&far, &size) ||
        connect(peer, (struct sockaddr *)&near, size) || (!flags && connect(udp, (struct sockaddr *)&far, size)))
        return 1;
    struct tun *tun = gostnet_tun_open(pair[0], udp, flags, news);
    if (!tun || gostnet_tun_way(tun, 4, (uint8_t[]){10, 0, 0, 0}, 30, (uint8_t[]){10, 0, 0, 1}) || gostnet_tun_start(tun))
        return 1;
    for (int round = 0; round < rounds; round++) {
        size_t length = make(packet, 65545);
        (void)send(pair[1], packet, length, MSG_DONTWAIT);
        length = make(packet, 65000);
        if (!any(8))
            memcpy(packet + 10, "GOST", 4);
        size_t cut = any(4) ? length - 10 : any((uint32_t)length - 9), step = any(2) ? cut + 1 : 1 + any(1500);
        if (cut / step > 60)
            step = cut / 60 + 1;
        union {
            struct cmsghdr align;
            char room[CMSG_SPACE(2)];
        } control = {0};
        struct iovec iov = {packet + 10, cut};
        struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
        if (step < cut) {
            header.msg_control = control.room;
            header.msg_controllen = sizeof control.room;
            control.align.cmsg_level = IPPROTO_UDP;
            control.align.cmsg_type = 103;
            control.align.cmsg_len = CMSG_LEN(2);
            memcpy(CMSG_DATA(&control.align), &(uint16_t){(uint16_t)step}, 2);
        }
        (void)sendmsg(peer, &header, MSG_DONTWAIT);
        uint8_t address[16] = {10, 0, 0, (uint8_t)any(4)};
        if (any(3))
            (void)gostnet_tun_learn(tun, flags & 2 ? 0 : 4, address, &far, sizeof far);
        else
            gostnet_tun_forget(tun, flags & 2 ? 0 : 4, address);
        if (!any(16))
            (void)gostnet_tun_take(tun, into);
        swallow(pair[1], into);
        swallow(peer, into);
    }
    static const uint8_t marker[10 + 40] = {[10] = 0x45, [13] = 40, [19] = 253, [22] = 10, [25] = 2, [26] = 10, [29] = 9};
    uint8_t back[sizeof marker];
    memcpy(back, marker, sizeof marker);
    back[29] = 2;
    uint8_t second[16] = {10, 0, 0, 2};
    (void)gostnet_tun_learn(tun, flags & 2 ? 0 : 4, second, &far, sizeof far);
    uint8_t ninth[16] = {10, 0, 0, 9};
    gostnet_tun_forget(tun, 4, ninth);
    int well = passes(peer, pair[1], marker, sizeof marker, 10, 0) && passes(pair[1], peer, back, sizeof back, 0, 10);
    uint64_t totals[9];
    gostnet_tun_count(tun, totals);
    if (!well || totals[8])
        fprintf(stderr, "flags %d: passes %d, error %d\n", flags, well, (int)totals[8]);
    gostnet_tun_close(tun);
    int all[] = {pair[0], pair[1], udp, peer, news};
    for (int i = 0; i < 5; i++)
        close(all[i]);
    return !well || totals[8];
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    state = strtoull(words[1], NULL, 10) * 77 + 5;
    int failed = 0;
    for (int flags = 0; flags < 8; flags++)
        if (!flags || flags & 1)
            failed |= throw_at(flags, atoi(words[2]));
    return failed;
}
