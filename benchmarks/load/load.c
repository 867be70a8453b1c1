/* Load for the benchmarks: the origin server, and a client that measures. One thread and one epoll set each, so that a
 * proxy between them is the slower one: bulk is received without being copied (MSG_TRUNC), and nothing is allocated
 * while it runs.
 *
 *   load serve PORT                      TCP: the first byte says what to do: 'R' sends without end, 'S' swallows, 'E'
 *                                        echoes. UDP: echoes.
 *   load MODE TARGET [option=value]...   prints {"event":"start"} when warm, and one line of JSON at the end
 *
 * MODE is download or upload (`streams` connections), short (`streams` at a time: connect, 100 bytes and back, close),
 * exchange (`streams` open: `size` bytes and back, again and again), idle (`streams` connections with one exchange
 * each, held until a signal ends them), udp (`streams` flows keep `window` datagrams of `size` bytes on their way; with
 * a proxy each is an association).
 * Addresses are a.b.c.d:port. Options: socks=ADDRESS (a SOCKS5 proxy), login=USER:PASSWORD (for it), streams, size,
 * window, seconds, warm.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 1 << 18, EVENTS = 256, BURST = 64, DATAGRAM = 65536, OPENING = 100, MOST_FAILURES = 10000 };

static char buffer[BUFFER];
static int epoll;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void watch(int fd, void *what, uint32_t events, int operation)
{
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(epoll, operation, fd, &event))
        die("epoll_ctl");
}

static void set(int fd, int level, int name, int value)
{
    setsockopt(fd, level, name, &value, sizeof value);
}

static struct sockaddr_in parse(const char *text)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    char host[64];
    const char *colon = strrchr(text, ':');
    if (!colon || (size_t)(colon - text) >= sizeof host)
        die(text);
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = 0;
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        die(text);
    address.sin_port = htons((uint16_t)atoi(colon + 1));
    return address;
}

/* ---- latencies: a histogram of 32 steps per octave, which is 3 % --------------------------------------------------- */

enum { STEPS = 32, OCTAVES = 32 };
static uint64_t histogram[STEPS * OCTAVES], samples;

static void note(double seconds)
{
    uint64_t ns = seconds > 0 ? (uint64_t)(seconds * 1e9) : 0;
    unsigned octave = ns < STEPS ? 0 : 63u - (unsigned)__builtin_clzll(ns) - 4u;
    uint64_t step = octave ? (ns >> (octave - 1)) - STEPS + octave * STEPS : ns;
    histogram[step < STEPS * OCTAVES ? step : STEPS * OCTAVES - 1]++;
    samples++;
}

static double percentile(double share)
{
    uint64_t wanted = (uint64_t)((double)samples * share), seen = 0;
    for (unsigned i = 0; i < STEPS * OCTAVES; i++) {
        seen += histogram[i];
        if (seen > wanted) {
            unsigned octave = i / STEPS;
            double ns = octave ? (double)((uint64_t)(i % STEPS + STEPS) << (octave - 1)) : i;
            return ns * 1e-3;
        }
    }
    return 0;
}

/* ---- datagrams ------------------------------------------------------------------------------------------------------ */

static char datagrams[BURST][DATAGRAM];
static struct iovec vectors[BURST];
static struct mmsghdr messages[BURST];
static struct sockaddr_in names[BURST];

static void prepare(size_t size, bool named)
{
    for (int i = 0; i < BURST; i++) {
        vectors[i] = (struct iovec){datagrams[i], size};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
        if (named) {
            messages[i].msg_hdr.msg_name = &names[i];
            messages[i].msg_hdr.msg_namelen = sizeof names[i];
        }
    }
}

static void large_buffers(int fd)
{
    set(fd, SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20);
    set(fd, SOL_SOCKET, SO_SNDBUFFORCE, 8 << 20);
}

static void echo_datagrams(int fd)
{
    for (;;) {
        prepare(DATAGRAM, true);
        int count = recvmmsg(fd, messages, BURST, MSG_DONTWAIT, NULL);
        if (count <= 0)
            return;
        for (int i = 0; i < count; i++)
            vectors[i].iov_len = messages[i].msg_len;
        for (int sent = 0; sent < count;) {
            int more = sendmmsg(fd, messages + sent, (unsigned)(count - sent), 0);
            if (more <= 0)
                break;
            sent += more;
        }
    }
}

/* ---- the server ----------------------------------------------------------------------------------------------------- */

struct peer {
    int fd;
    char mode; /* 0 until the first byte has come */
};

static bool serve_peer(struct peer *peer)
{
    ssize_t count;
    if (!peer->mode) {
        char mode;
        count = recv(peer->fd, &mode, 1, MSG_PEEK);
        if (count <= 0)
            return count < 0 && errno == EAGAIN;
        peer->mode = mode;
        if (mode == 'R')
            watch(peer->fd, peer, EPOLLOUT, EPOLL_CTL_MOD);
    }
    switch (peer->mode) {
    case 'R':
        count = send(peer->fd, buffer, sizeof buffer, MSG_NOSIGNAL);
        break;
    case 'S':
        count = recv(peer->fd, buffer, 1 << 20, MSG_TRUNC); /* counted, not copied */
        break;
    default:
        count = recv(peer->fd, buffer, 65536, 0);
        if (count > 0)
            count = send(peer->fd, buffer, (size_t)count, MSG_NOSIGNAL);
    }
    return count > 0 || (count < 0 && errno == EAGAIN);
}

static _Noreturn void serve(uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct peer listening = {.fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)};
    struct peer echo = {.fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0)};
    set(listening.fd, SOL_SOCKET, SO_REUSEADDR, 1);
    set(listening.fd, IPPROTO_TCP, TCP_NODELAY, 1);
    large_buffers(echo.fd);
    if (bind(listening.fd, (void *)&address, sizeof address) || listen(listening.fd, 65535) ||
        bind(echo.fd, (void *)&address, sizeof address))
        die("bind");
    watch(listening.fd, &listening, EPOLLIN, EPOLL_CTL_ADD);
    watch(echo.fd, &echo, EPOLLIN, EPOLL_CTL_ADD);
    puts("{\"event\":\"serving\"}");
    fflush(stdout);
    struct epoll_event events[EVENTS];
    for (;;) {
        int count = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            struct peer *peer = events[i].data.ptr;
            if (peer == &echo) {
                echo_datagrams(echo.fd);
            } else if (peer == &listening) {
                int fd = accept4(listening.fd, NULL, NULL, SOCK_NONBLOCK);
                if (fd < 0)
                    continue;
                struct peer *fresh = calloc(1, sizeof *fresh);
                if (!fresh)
                    die("calloc");
                fresh->fd = fd;
                watch(fd, fresh, EPOLLIN, EPOLL_CTL_ADD);
            } else if (!serve_peer(peer)) {
                close(peer->fd);
                free(peer);
            }
        }
    }
}

/* ---- the client ----------------------------------------------------------------------------------------------------- */

enum mode { DOWNLOAD, UPLOAD, SHORT, EXCHANGE, IDLE, UDP };
static const char *const MODES[] = {"download", "upload", "short", "exchange", "idle", "udp"};

static enum mode mode;
static struct sockaddr_in target, proxy;
static bool socks;
static char login[513]; /* version 1 | length | user | length | password (RFC 1929), nothing without credentials */
static size_t login_size;
static int streams = 1, window = 32;
static size_t size = 100;
static double seconds = 1, warm = 0.4;
static uint64_t bytes, done, failed, lost, held;
static double started, until;
static bool measuring;

/* Begin to measure once warm; tell whether it is over. */
static bool over(double time)
{
    if (!measuring && time >= started + warm) {
        measuring = true;
        bytes = done = lost = samples = 0;
        memset(histogram, 0, sizeof histogram);
        puts("{\"event\":\"start\"}");
        fflush(stdout);
        started = time = now();
        until = time + seconds;
    }
    return measuring && time >= until;
}

static void report(void)
{
    double took = now() - started;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"event\":\"end\",\"seconds\":%.4f,\"bytes\":%lu,\"done\":%lu,\"held\":%lu,\"failed\":%lu,\"lost\":%lu,"
           "\"p50\":%.2f,\"p99\":%.2f}\n",
           took, (unsigned long)bytes, (unsigned long)done, (unsigned long)held, (unsigned long)failed,
           (unsigned long)lost, percentile(0.5), percentile(0.99));
    fflush(stdout);
}

struct stream {
    int fd;
    enum { CONNECTING, METHOD, STATUS, REPLY, RUNNING } state;
    size_t got;
    double since;
};

static void open_stream(struct stream *stream)
{
    const struct sockaddr_in *where = socks ? &proxy : &target;
    stream->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (stream->fd < 0)
        die("socket");
    set(stream->fd, IPPROTO_TCP, TCP_NODELAY, 1);
    stream->state = CONNECTING;
    stream->got = 0;
    stream->since = now();
    if (connect(stream->fd, (const void *)where, sizeof *where) && errno != EINPROGRESS)
        die("connect");
    watch(stream->fd, stream, EPOLLOUT, EPOLL_CTL_ADD);
}

static void fail(struct stream *stream)
{
    close(stream->fd);
    if (++failed > MOST_FAILURES) {
        fprintf(stderr, "%lu connections failed\n", (unsigned long)failed);
        exit(1);
    }
    open_stream(stream);
}

static void send_message(struct stream *stream)
{
    stream->got = 0;
    if (mode != SHORT)
        stream->since = now();
    send(stream->fd, buffer, size, MSG_NOSIGNAL);
}

/* The way to the target is open: say the first word. */
static void begin(struct stream *stream)
{
    stream->state = RUNNING;
    if (mode == UPLOAD) {
        watch(stream->fd, stream, EPOLLOUT, EPOLL_CTL_MOD);
        return;
    }
    watch(stream->fd, stream, EPOLLIN, EPOLL_CTL_MOD);
    if (mode == DOWNLOAD)
        send(stream->fd, "R", 1, MSG_NOSIGNAL);
    else
        send_message(stream);
}

static bool step(struct stream *stream)
{
    ssize_t count;
    switch (stream->state) {
    case CONNECTING: {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(stream->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error)
            return false;
        if (!socks) {
            begin(stream);
            return true;
        }
        send(stream->fd, login_size ? "\5\1\2" : "\5\1\0", 3, MSG_NOSIGNAL);
        stream->state = METHOD;
        watch(stream->fd, stream, EPOLLIN, EPOLL_CTL_MOD);
        return true;
    }
    case METHOD:
    case STATUS: {
        char request[10] = {5, 1, 0, 1}, answer[2];
        bool asked = stream->state == METHOD && login_size;
        if (recv(stream->fd, answer, 2, 0) != 2 || answer[1] != (asked ? 2 : 0))
            return false;
        if (asked) {
            send(stream->fd, login, login_size, MSG_NOSIGNAL);
            stream->state = STATUS;
            return true;
        }
        memcpy(request + 4, &target.sin_addr, 4);
        memcpy(request + 8, &target.sin_port, 2);
        send(stream->fd, request, 10, MSG_NOSIGNAL);
        stream->state = REPLY;
        return true;
    }
    case REPLY: {
        char reply[32];
        count = recv(stream->fd, reply, 4, MSG_PEEK);
        if (count < 4 || reply[1])
            return false;
        size_t length = reply[3] == 4 ? 22 : 10; /* an address of IPv6 or IPv4 */
        if (recv(stream->fd, reply, length, 0) != (ssize_t)length)
            return false;
        begin(stream);
        return true;
    }
    case RUNNING:
        break;
    }
    if (mode == DOWNLOAD)
        count = recv(stream->fd, buffer, 1 << 20, MSG_TRUNC);
    else if (mode == UPLOAD)
        count = send(stream->fd, buffer, sizeof buffer, MSG_NOSIGNAL);
    else
        count = recv(stream->fd, buffer, size - stream->got, 0);
    if (count <= 0)
        return count < 0 && errno == EAGAIN;
    bytes += (uint64_t)count;
    if (mode == DOWNLOAD || mode == UPLOAD)
        return true;
    stream->got += (size_t)count;
    if (stream->got < size)
        return true;
    done++;
    note(now() - stream->since);
    if (mode == SHORT) {
        close(stream->fd);
        open_stream(stream);
    } else if (mode == EXCHANGE) {
        send_message(stream);
    } else {
        held++;
        watch(stream->fd, stream, 0, EPOLL_CTL_MOD);
    }
    return true;
}

static void run_streams(void)
{
    struct stream *all = calloc((size_t)streams, sizeof *all);
    if (!all)
        die("calloc");
    memset(buffer, mode == UPLOAD ? 'S' : 'E', sizeof buffer);
    int opened = 0;
    struct epoll_event events[EVENTS];
    started = now();
    for (;;) {
        int most = mode == IDLE ? (int)held + OPENING : streams;
        while (opened < streams && opened < most)
            open_stream(&all[opened++]);
        if (mode == IDLE ? held == (uint64_t)streams : over(now()))
            return;
        int count = epoll_wait(epoll, events, EVENTS, 100);
        for (int i = 0; i < count; i++) {
            struct stream *stream = events[i].data.ptr;
            if (!step(stream))
                fail(stream);
        }
    }
}

/* ---- associations: RFC 1928 section 7 ---- */

enum { HEADER = 10 }; /* of a datagram to an address of IPv4 */
static char outgoing[DATAGRAM];

static void exactly(int fd, void *into, size_t length)
{
    if (recv(fd, into, length, MSG_WAITALL) != (ssize_t)length)
        die("the proxy's reply");
}

/* Open an association, which lives as long as this process; return the address that takes its datagrams. */
static struct sockaddr_in associate(void)
{
    struct sockaddr_in relay = proxy;
    char reply[4], method[2], rest[18];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&proxy, sizeof proxy))
        die("connect");
    send(fd, "\5\1\0", 3, MSG_NOSIGNAL);
    exactly(fd, method, sizeof method);
    send(fd, "\5\3\0\1\0\0\0\0\0\0", 10, MSG_NOSIGNAL);
    exactly(fd, reply, sizeof reply);
    if (reply[1])
        die("the proxy refuses an association");
    size_t length = reply[3] == 4 ? 16 : 4;
    exactly(fd, rest, length + 2);
    static const char nowhere[16];
    if (length == 4 && memcmp(rest, nowhere, 4))
        memcpy(&relay.sin_addr, rest, 4);
    else if (length == 16 && !memcmp(rest, "\0\0\0\0\0\0\0\0\0\0\377\377", 12))
        memcpy(&relay.sin_addr, rest + 12, 4);
    memcpy(&relay.sin_port, rest + length, 2);
    return relay;
}

/* A flow that hears nothing for this long has lost what it had on the way, and begins anew. */
static const double SILENCE = 0.1;

struct datagram_flow {
    int fd, missing;
    double heard, sent;
};

static void fill(struct datagram_flow *flow, int count)
{
    while (count > 0) {
        int batch = count < BURST ? count : BURST;
        prepare(size, false);
        for (int i = 0; i < batch; i++)
            vectors[i].iov_base = outgoing;
        int sent = sendmmsg(flow->fd, messages, (unsigned)batch, 0);
        if (sent <= 0)
            return;
        flow->missing += sent;
        count -= sent;
    }
}

static void run_datagrams(void)
{
    struct datagram_flow *flows = calloc((size_t)streams, sizeof *flows);
    if (!flows)
        die("calloc");
    if (socks) {
        size += HEADER;
        memcpy(outgoing, "\0\0\0\1", 4);
        memcpy(outgoing + 4, &target.sin_addr, 4);
        memcpy(outgoing + 8, &target.sin_port, 2);
    }
    for (int i = 0; i < streams; i++) {
        flows[i].fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        large_buffers(flows[i].fd);
        struct sockaddr_in where = socks ? associate() : target;
        if (connect(flows[i].fd, (void *)&where, sizeof where))
            die("connect");
        watch(flows[i].fd, &flows[i], EPOLLIN, EPOLL_CTL_ADD);
        flows[i].heard = flows[i].sent = now();
        fill(&flows[i], window);
    }
    struct epoll_event events[EVENTS];
    started = now();
    double looked = started;
    for (;;) {
        double time = now();
        if (over(time))
            return;
        if (time - looked > SILENCE / 2) {
            looked = time;
            for (int i = 0; i < streams; i++)
                if (time - flows[i].heard > SILENCE) {
                    lost += (uint64_t)flows[i].missing;
                    flows[i].missing = 0;
                    flows[i].heard = flows[i].sent = time;
                    fill(&flows[i], window);
                }
        }
        int count = epoll_wait(epoll, events, EVENTS, 50);
        for (int i = 0; i < count; i++) {
            struct datagram_flow *flow = events[i].data.ptr;
            prepare(DATAGRAM, false);
            int got = recvmmsg(flow->fd, messages, BURST, MSG_DONTWAIT, NULL);
            if (got <= 0)
                continue;
            for (int k = 0; k < got; k++)
                bytes += messages[k].msg_len;
            done += (uint64_t)got;
            flow->missing = flow->missing > got ? flow->missing - got : 0;
            flow->heard = now();
            if (window == 1) /* with several on the way nobody knows which one came back */
                note(flow->heard - flow->sent);
            flow->sent = flow->heard;
            fill(flow, window - flow->missing);
        }
    }
}

static void read_option(const char *option)
{
    const char *value = strchr(option, '=');
    if (!value)
        die(option);
    size_t length = (size_t)(value++ - option);
    if (!strncmp(option, "socks", length)) {
        socks = true;
        proxy = parse(value);
    } else if (!strncmp(option, "login", length)) {
        const char *colon = strchr(value, ':');
        size_t user = colon ? (size_t)(colon - value) : 0, password = colon ? strlen(colon + 1) : 0;
        if (!colon || user > 255 || password > 255)
            die(option);
        login_size = 3 + user + password;
        login[0] = 1;
        login[1] = (char)user;
        memcpy(login + 2, value, user);
        login[2 + user] = (char)password;
        memcpy(login + 3 + user, colon + 1, password);
    } else if (!strncmp(option, "streams", length)) {
        streams = atoi(value);
    } else if (!strncmp(option, "seconds", length)) {
        seconds = atof(value);
    } else if (!strncmp(option, "window", length)) {
        window = atoi(value);
    } else if (!strncmp(option, "warm", length)) {
        warm = atof(value);
    } else if (!strncmp(option, "size", length)) {
        size = (size_t)atoi(value);
    } else {
        die(option);
    }
}

int main(int count, char **arguments)
{
    if (count < 3)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(0);
    if (!strcmp(arguments[1], "serve"))
        serve((uint16_t)atoi(arguments[2]));
    for (mode = DOWNLOAD; strcmp(arguments[1], MODES[mode]); mode++)
        if (mode == UDP)
            return 2;
    target = parse(arguments[2]);
    for (int i = 3; i < count; i++)
        read_option(arguments[i]);
    if (mode == UDP)
        run_datagrams();
    else
        run_streams();
    report();
    if (mode == IDLE)
        pause();
    return 0;
}
