/* A load client for the management API: C keep-alive connections, one request in flight on each.
 *
 *   http_load HOST PORT FILE CONNECTIONS WARM_UP SECONDS
 *
 * Each line of FILE is a request: method, space, path, tab, JSON body (which may be empty). SECONDS 0 sends each line
 * once. Prints `start` when it begins to count, then a JSON object. One thread, epoll.
 */

#define _GNU_SOURCE
#include "load.h"

#define INPUT_SIZE (1 << 18)

typedef struct {
    int fd, index;
    char *input, *output;
    size_t input_length, output_length, output_sent;
    uint64_t started;
} connection_t;

static bool once, counting, draining;
static size_t next_line;
static uint64_t *per_connection;
static int waiting;
static const char *host_header;

static void push(connection_t *c) {
    while (c->output_sent < c->output_length) {
        ssize_t n = send(c->fd, c->output + c->output_sent, c->output_length - c->output_sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) continue; /* a request is small: the socket takes it */
            die("send: %s", strerror(errno));
        }
        c->output_sent += (size_t)n;
    }
}

static void next_request(connection_t *c) {
    if (once && next_line == line_count) draining = true;
    if (draining) return;
    line_t line = lines[next_line++ % line_count];
    const char *tab = memchr(line.text, '\t', line.length);
    if (!tab) die("a line without a tab");
    int request = (int)(tab - line.text);
    int body = (int)line.length - request - 1;
    c->output_length = (size_t)snprintf(c->output, INPUT_SIZE,
                                        "%.*s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
                                        "Content-Length: %d\r\n\r\n%.*s",
                                        request, line.text, host_header, body, body, tab + 1);
    c->output_sent = 0;
    c->started = now_ns();
    waiting++;
    push(c);
}

/* Length of the complete response at the start of the input, 0 if there is more to come. */
static size_t response_length(connection_t *c) {
    char *end = memmem(c->input, c->input_length, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head = (size_t)(end - c->input) + 4, body = 0;
    *end = 0;
    char *length = strcasestr(c->input, "\r\ncontent-length:");
    if (length) body = strtoul(length + 17, NULL, 10);
    else if (strcasestr(c->input, "\r\ntransfer-encoding:")) die("chunked responses are not expected");
    *end = '\r';
    return c->input_length >= head + body ? head + body : 0;
}

static void read_in(connection_t *c) {
    ssize_t n = recv(c->fd, c->input + c->input_length, INPUT_SIZE - 1 - c->input_length, 0);
    if (n == 0) die("the server closed a connection");
    if (n < 0) {
        if (errno == EAGAIN) return;
        die("recv: %s", strerror(errno));
    }
    c->input_length += (size_t)n;
    size_t length = response_length(c);
    if (!length) return;
    if (length != c->input_length) die("more than one response to one request");
    unsigned status = (unsigned)atoi(c->input + 9);
    if (counting) {
        record_latency(now_ns() - c->started);
        per_connection[c->index]++;
        statuses[status < 1000 ? status : 999]++;
    }
    c->input_length = 0;
    waiting--;
    next_request(c);
}

int main(int argc, char **argv) {
    if (argc != 7) die("usage: http_load HOST PORT FILE CONNECTIONS WARM_UP SECONDS");
    host_header = argv[1];
    read_lines(argv[3]);
    int count = atoi(argv[4]);
    double warm_up = atof(argv[5]), seconds = atof(argv[6]);
    once = seconds == 0;
    connection_t *connections = calloc((size_t)count, sizeof *connections);
    per_connection = calloc((size_t)count, sizeof *per_connection);
    int poll = epoll_create1(0);
    for (int i = 0; i < count; i++) {
        connection_t *c = &connections[i];
        c->index = i;
        c->fd = connect_to(argv[1], atoi(argv[2]));
        c->input = malloc(INPUT_SIZE);
        c->output = malloc(INPUT_SIZE);
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &event);
    }
    uint64_t begin = now_ns() + (uint64_t)(warm_up * 1e9);
    uint64_t stop = once ? UINT64_MAX : begin + (uint64_t)(seconds * 1e9), stopped = 0;
    double processor = 0;
    if (once) {
        counting = true;
        announce_start();
        processor = processor_seconds();
        begin = now_ns();
    }
    for (int i = 0; i < count; i++) next_request(&connections[i]);
    struct epoll_event events[64];
    while (waiting || !draining) {
        int ready = epoll_wait(poll, events, 64, 10000);
        if (ready == 0) die("no response within ten seconds");
        for (int i = 0; i < ready; i++) read_in(events[i].data.ptr);
        uint64_t now = now_ns();
        if (!counting && !stopped && now >= begin) {
            counting = true;
            announce_start();
            reset_counts();
            memset(per_connection, 0, (size_t)count * sizeof *per_connection);
            processor = processor_seconds();
            begin = now_ns();
        }
        if (counting && now >= stop) {
            counting = false;
            draining = true;
            stopped = now;
            print_result((double)(now - begin) / 1e9, processor_seconds() - processor, per_connection, count);
        }
    }
    if (!stopped) print_result((double)(now_ns() - begin) / 1e9, processor_seconds() - processor, per_connection, count);
    return 0;
}
