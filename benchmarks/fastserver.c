/* A fast endpoint that keeps its own truth: it answers POST /v1/messages and /v1/chat/completions as their APIs do.
 *
 *   cc -O2 -o fastserver fastserver.c && ./fastserver
 *
 * It says where it listens, then serves until it is killed; Linux, one thread. An answer has as many events with a word
 * as tokens were asked for. PUT /pace/TTFT/ITL sets the microseconds to the first and between two. GET /truth gives,
 * and forgets, a line for each answer: who asked (session header or request id), when the request was whole, when the
 * first event was written, and the last (ns, CLOCK_MONOTONIC; 0: not streamed), and how many. A request is whole when
 * the kernel had its last byte. A prompt's tokens are the spaces and opening braces from its tools, system or messages
 * on: any word more is a token more. What a connection asked before is what is read from its cache.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "fastserver_events.h"

#define MOST 65536
#define SECOND 1000000000LL

struct timer {
    ns due;
    int fd, life;
};

static struct conn *conns[MOST];
static struct timer heap[MOST];
static int timers, poller, alarm_fd;
static ns ttft, itl;
static char *truth;
static size_t told, truth_room;

static ns clock_ns(clockid_t which) {
    struct timespec now;
    clock_gettime(which, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static void drop(int fd) {
    struct conn *conn = conns[fd];
    conn->life++;
    conn->len = conn->whole = conn->head = 0;
    conn->before = 0;
    close(fd);
}

static void push_out(int fd, const char *data, size_t left) {
    while (left) {
        ssize_t done = send(fd, data, left, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (done < 0) {
            struct pollfd full = {fd, POLLOUT, 0};
            if (errno != EAGAIN || poll(&full, 1, 10000) <= 0)
                return; /* whoever asked is gone, which its reading end will tell */
            continue;
        }
        data += done, left -= done;
    }
}

/* A body in one piece. */
static void whole(int fd, int status, const char *body, size_t length) {
    char head[200];
    int size = snprintf(head, sizeof head, "HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n",
                        status, status == 200 ? "OK" : "Not Found", length);
    push_out(fd, head, size);
    push_out(fd, body, length);
}

static void arm(void) {
    struct itimerspec when = {{0, 0}, {0, 0}};
    if (timers) {
        when.it_value.tv_sec = heap[0].due / SECOND;
        when.it_value.tv_nsec = heap[0].due % SECOND;
    }
    timerfd_settime(alarm_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void wake_at(int fd, ns due) {
    int at = timers++;
    struct timer one = {due, fd, conns[fd]->life};
    for (; at && heap[(at - 1) / 2].due > due; at = (at - 1) / 2)
        heap[at] = heap[(at - 1) / 2];
    heap[at] = one;
}

static struct timer next_timer(void) {
    struct timer top = heap[0], last = heap[--timers];
    int at = 0, below;
    while ((below = 2 * at + 1) < timers) {
        if (below + 1 < timers && heap[below + 1].due < heap[below].due)
            below++;
        if (heap[below].due >= last.due)
            break;
        heap[at] = heap[below], at = below;
    }
    heap[at] = last;
    return top;
}

static void remember(struct conn *conn, ns last) {
    if (told + 256 > truth_room)
        truth = realloc(truth, truth_room = truth_room * 2 + (1 << 20));
    told += sprintf(truth + told, "%s\t%lld\t%lld\t%lld\t%ld\n", conn->who, (long long)conn->arrived,
                    (long long)conn->first, (long long)last, conn->output);
}

/* The next write of an answer: a chunk with a word, and with what goes before the first or after the last. */
static void write_next(int fd) {
    struct conn *conn = conns[fd];
    char framed[sizeof out + 300];
    int size = 0, last = conn->sent + 1 >= conn->output;
    outlen = 0;
    if (!conn->sent)
        opening(conn);
    word(conn);
    if (last)
        closing(conn);
    if (!conn->sent)
        size = sprintf(framed, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
    size += sprintf(framed + size, "%zx\r\n", outlen);
    memcpy(framed + size, out, outlen);
    size += outlen;
    size += sprintf(framed + size, last ? "\r\n0\r\n\r\n" : "\r\n");
    ns now = clock_ns(CLOCK_MONOTONIC);
    if (!conn->sent)
        conn->first = now;
    conn->sent++;
    if (last) {
        remember(conn, now);
        conn->before = conn->prompt;
        conn->len = conn->whole = conn->head = 0;
    } else {
        conn->due += itl; /* evenly, however late this one was */
        wake_at(fd, conn->due);
    }
    push_out(fd, framed, size);
}

/* A number or literal after a field's name in the first or last 4 KB of a body; NULL where it is not there. */
static const char *field(const char *body, size_t length, const char *name) {
    size_t part = length < 4096 ? length : 4096;
    const char *found = memmem(body, part, name, strlen(name));
    if (!found)
        found = memmem(body + length - part, part, name, strlen(name));
    if (!found)
        return NULL;
    for (found += strlen(name); *found == ' ' || *found == ':'; found++)
        ;
    return found;
}

static long counted(const char *body, size_t length) {
    static const char *names[] = {"\"tools\":", "\"system\":", "\"messages\":"};
    size_t part = length < 4096 ? length : 4096, from = length;
    for (int i = 0; i < 3; i++) {
        const char *found = memmem(body, part, names[i], strlen(names[i]));
        if (found && (size_t)(found - body) < from)
            from = found - body;
    }
    long tokens = 0;
    for (size_t at = from; at < length; at++)
        tokens += (body[at] == ' ') + (body[at] == '{');
    return tokens ? tokens : 1;
}

static void header(struct conn *conn, const char *name, char *value, size_t room) {
    char *found = strcasestr(conn->in, name);
    if (!found || found > conn->in + conn->head)
        return;
    found += strlen(name);
    size_t length = strcspn(found, "\r\n");
    snprintf(value, room, "%.*s", (int)(length < room ? length : room - 1), found);
}

static void ask(int fd) {
    struct conn *conn = conns[fd];
    char *body = conn->in + conn->head;
    size_t length = conn->whole - conn->head;
    const char *limit = field(body, length, "\"max_tokens\""), *stream = field(body, length, "\"stream\"");
    if (!limit)
        limit = field(body, length, "\"max_completion_tokens\"");
    strcpy(conn->who, "-");
    header(conn, "\r\nx-request-id: ", conn->who, sizeof conn->who);
    header(conn, "\r\nx-dynamo-session-id: ", conn->who, sizeof conn->who);
    header(conn, "\r\nx-claude-code-session-id: ", conn->who, sizeof conn->who);
    conn->output = limit && atol(limit) > 0 ? atol(limit) : 1;
    conn->prompt = counted(body, length);
    if (conn->before > conn->prompt)
        conn->before = conn->prompt;
    conn->sent = conn->first = 0;
    if (stream && !strncmp(stream, "true", 4)) {
        conn->due = conn->arrived + ttft;
        if (ttft)
            wake_at(fd, conn->due);
        else
            write_next(fd);
        return;
    }
    outlen = 0;
    say(conn->chat ? "{\"object\":\"chat.completion\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
                     "\"word\"},\"finish_reason\":\"stop\"}],"
                   : "{\"type\":\"message\",\"role\":\"assistant\",\"content\":[{\"type\":\"text\",\"text\":\"word\"}],"
                     "\"stop_reason\":\"end_turn\",");
    usage(conn);
    say("}");
    remember(conn, 0);
    conn->before = conn->prompt;
    conn->len = conn->whole = conn->head = 0;
    whole(fd, 200, out, outlen);
}

static void request(int fd) {
    struct conn *conn = conns[fd];
    static const char models[] = "{\"object\":\"list\",\"data\":[{\"id\":\"fast\",\"object\":\"model\"}]}";
    conn->chat = !strncmp(conn->in, "POST /v1/chat/", 14);
    if (conn->chat || !strncmp(conn->in, "POST /v1/messages", 17)) {
        ask(fd);
        return;
    }
    if (!strncmp(conn->in, "GET /truth", 10))
        whole(fd, 200, truth, told), told = 0;
    else if (sscanf(conn->in, "PUT /pace/%ld/%ld", &ttft, &itl) == 2)
        ttft *= 1000, itl *= 1000, whole(fd, 200, "{}", 2);
    else if (!strncmp(conn->in, "GET /health", 11))
        whole(fd, 200, "{\"status\":\"ok\"}", 15);
    else if (!strncmp(conn->in, "GET /v1/models", 14))
        whole(fd, 200, models, sizeof models - 1);
    else
        whole(fd, 404, "{}", 2);
    conn->len = conn->whole = conn->head = 0;
}

/* When the kernel had what was just read, or now. */
static ns stamped(struct msghdr *message) {
    ns now = clock_ns(CLOCK_MONOTONIC);
    struct cmsghdr *each = CMSG_FIRSTHDR(message);
    if (!each || each->cmsg_type != SCM_TIMESTAMPNS)
        return now;
    struct timespec at;
    memcpy(&at, CMSG_DATA(each), sizeof at);
    ns ago = clock_ns(CLOCK_REALTIME) - (at.tv_sec * SECOND + at.tv_nsec);
    return ago > 0 ? now - ago : now;
}

static void find_end(struct conn *conn) {
    char *end = memmem(conn->in, conn->len, "\r\n\r\n", 4), length[32] = "0";
    if (!end)
        return;
    conn->head = end + 4 - conn->in;
    header(conn, "\r\ncontent-length: ", length, sizeof length);
    conn->whole = conn->head + atol(length);
}

static void readable(int fd) {
    struct conn *conn = conns[fd];
    for (int again = 1; again;) {
        if (conn->room < conn->len + (1 << 18) + 1)
            conn->in = realloc(conn->in, conn->room = 2 * conn->len + (1 << 18) + 1);
        char control[64];
        struct iovec part = {conn->in + conn->len, 1 << 18};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);
        if (got < 0 && errno == EAGAIN)
            return;
        if (got <= 0) {
            drop(fd);
            return;
        }
        conn->arrived = stamped(&message);
        conn->len += got;
        conn->in[conn->len] = 0;
        again = got == 1 << 18;
    }
    if (!conn->head)
        find_end(conn);
    if (conn->head && conn->len >= conn->whole)
        request(fd);
}

static void welcome(int listener) {
    int fd = accept(listener, NULL, NULL), yes = 1;
    if (fd < 0)
        return;
    if (fd >= MOST) {
        close(fd);
        return;
    }
    if (!conns[fd])
        conns[fd] = calloc(1, sizeof(struct conn));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &yes, sizeof yes);
    struct epoll_event wanted = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &wanted);
}

int main(void) {
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct rlimit files = {MOST, MOST};
    socklen_t size = sizeof place;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    setrlimit(RLIMIT_NOFILE, &files);
    poller = epoll_create1(0), alarm_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    if (bind(listener, (struct sockaddr *)&place, size) || listen(listener, 4096))
        return perror("fastserver"), 1;
    getsockname(listener, (struct sockaddr *)&place, &size);
    printf("fastserver: listening on http://127.0.0.1:%d\n", ntohs(place.sin_port));
    fflush(stdout);
    struct epoll_event events[256], wanted = {.events = EPOLLIN, .data.fd = listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &wanted);
    wanted.data.fd = alarm_fd;
    epoll_ctl(poller, EPOLL_CTL_ADD, alarm_fd, &wanted);
    for (ns armed = 0;;) {
        if (armed != (timers ? heap[0].due : 0))
            armed = timers ? heap[0].due : 0, arm();
        int count = epoll_wait(poller, events, 256, -1);
        while (timers && heap[0].due <= clock_ns(CLOCK_MONOTONIC)) {
            struct timer one = next_timer();
            if (conns[one.fd]->life == one.life)
                write_next(one.fd);
        }
        for (int i = 0; i < count; i++) {
            if (events[i].data.fd == listener)
                welcome(listener);
            else if (events[i].data.fd != alarm_fd)
                readable(events[i].data.fd);
        }
    }
}
