/* A load client for the look-ups of protocol adapters: AMQP 1.0 request/response over plain TCP.
 *
 * It behaves as a stock adapter does on the wire: SASL PLAIN, one session, a reply link and a request link, unsettled
 * requests, one disposition for the replies of each read, credit topped up. It keeps N requests in flight on each of
 * C connections, checks status and correlation of each reply, and costs well under two microseconds a request, so that
 * it is not what is measured. One thread, epoll.
 *
 *   amqp_load HOST PORT USER PASSWORD TARGET KIND FILE CONNECTIONS IN_FLIGHT WARM_UP SECONDS [RATE]
 *
 * KIND is `device` (each line of FILE is sent as application property device_id, subject assert), `body` (each line
 * is the body, subject get), or a subject of the Device Connection API: each line is then the device_id, for
 * set-... followed by a tab and the gateway_id or adapter_instance_id, for get-cmd-... by a tab and the body. SECONDS 0 sends each line once. Prints `start` when it begins to count, then a JSON
 * object. With RATE so many requests a second are offered, whether or not replies come, up to IN_FLIGHT on each
 * connection; a reply's time counts from when its request was due.
 */

#include "load.h"

#include <sys/timerfd.h>

#define INPUT_SIZE (1 << 20)
#define MAX_IN_FLIGHT 4096
#define REPLY_CREDIT 200

typedef struct {
    uint8_t *at, *end;
} span_t;

typedef struct {
    int fd, index;
    bool writable;
    uint8_t *input, *output;
    size_t input_length, output_length, output_sent, output_size;
    uint32_t sent, credit_limit, window_limit; /* limits: the first delivery that may not be sent */
    uint32_t in_flight, replies, reply_credit_left;
    uint32_t first_unsettled, unsettled;
    uint64_t started[MAX_IN_FLIGHT];
    uint32_t slot_of[MAX_IN_FLIGHT], free_slots[MAX_IN_FLIGHT], free_count;
    char reply_to[300];
} connection_t;

static connection_t *connections;
static int connection_count, in_flight_goal;
static const char *target, *subject;
static bool by_device, has_body;
static const char *argument; /* name of the second application property, if there is one */
static bool once, counting, draining;
static size_t next_line;
static uint64_t *per_connection;
static uint64_t total_in_flight;
static uint64_t interval, next_due; /* ns between two requests that are offered, 0 for as many as there can be */

/* --- writing --- */

static void put(connection_t *c, const void *data, size_t length) {
    if (c->output_length + length > c->output_size) {
        c->output_size = (c->output_length + length) * 2;
        c->output = realloc(c->output, c->output_size);
        if (!c->output) die("out of memory");
    }
    memcpy(c->output + c->output_length, data, length);
    c->output_length += length;
}

static void put_byte(connection_t *c, unsigned value) {
    uint8_t byte = (uint8_t)value;
    put(c, &byte, 1);
}

static void put_u32(connection_t *c, uint32_t value) {
    value = htonl(value);
    put(c, &value, 4);
}

static void put_uint(connection_t *c, uint32_t value) {
    put_byte(c, 0x70);
    put_u32(c, value);
}

static void put_variable(connection_t *c, unsigned narrow, unsigned wide, const void *data, size_t length) {
    if (length < 256) {
        put_byte(c, narrow);
        put_byte(c, (unsigned)length);
    } else {
        put_byte(c, wide);
        put_u32(c, (uint32_t)length);
    }
    put(c, data, length);
}

static void put_string(connection_t *c, const char *text) { put_variable(c, 0xa1, 0xb1, text, strlen(text)); }

/* A described list of which size and count are filled in at its end. */
static size_t open_list(connection_t *c, unsigned code, unsigned constructor, uint32_t count) {
    put_byte(c, 0x00);
    put_byte(c, 0x53);
    put_byte(c, code);
    put_byte(c, constructor);
    size_t at = c->output_length;
    put_u32(c, 0);
    put_u32(c, count);
    return at;
}

static void close_list(connection_t *c, size_t at) {
    uint32_t size = htonl((uint32_t)(c->output_length - at - 4));
    memcpy(c->output + at, &size, 4);
}

static size_t open_frame(connection_t *c, unsigned type) {
    size_t at = c->output_length;
    put_u32(c, 0);
    put_byte(c, 2);
    put_byte(c, type);
    put_byte(c, 0);
    put_byte(c, 0);
    return at;
}

static void close_frame(connection_t *c, size_t at) {
    uint32_t size = htonl((uint32_t)(c->output_length - at));
    memcpy(c->output + at, &size, 4);
}

static void put_address(connection_t *c, unsigned code, const char *address) {
    size_t list = open_list(c, code, 0xd0, 1);
    put_string(c, address);
    close_list(c, list);
}

static void put_attach(connection_t *c, unsigned handle, bool receiver) {
    size_t frame = open_frame(c, 0), list = open_list(c, 0x12, 0xd0, 10);
    put_string(c, receiver ? "replies" : "requests");
    put_uint(c, handle);
    put_byte(c, receiver ? 0x41 : 0x42);
    put(c, "\x50\x00", 2); /* snd-settle-mode unsettled */
    put(c, "\x50\x00", 2); /* rcv-settle-mode first */
    put_address(c, 0x28, receiver ? c->reply_to : "");
    put_address(c, 0x29, receiver ? "" : target);
    put_byte(c, 0x40);
    put_byte(c, 0x40);
    if (receiver) put_byte(c, 0x40);
    else put_uint(c, 0);
    close_list(c, list);
    close_frame(c, frame);
}

static void put_flow(connection_t *c) {
    size_t frame = open_frame(c, 0), list = open_list(c, 0x13, 0xd0, 7);
    put_uint(c, c->replies);    /* next-incoming-id: the server counts from 0, which begin() checks */
    put_uint(c, 2147483647u);   /* incoming-window */
    put_uint(c, c->sent);       /* next-outgoing-id */
    put_uint(c, 2147483647u);   /* outgoing-window */
    put_uint(c, 0);             /* handle of the reply link */
    put_uint(c, c->replies);    /* delivery-count */
    put_uint(c, REPLY_CREDIT);
    close_list(c, list);
    close_frame(c, frame);
    c->reply_credit_left = REPLY_CREDIT;
}

/* A request in the encoding of the stock adapters' library: wide properties, everything else narrow. */
static void put_request(connection_t *c, line_t line, uint32_t slot) {
    size_t frame = open_frame(c, 0);
    char id[24];
    uint32_t tag = htonl(c->sent);
    put(c, "\x00\x53\x14\xc0\x10\x05\x52\x01", 8); /* handle 1 */
    put_uint(c, c->sent);
    put_variable(c, 0xa0, 0xb0, &tag, 4);
    put(c, "\x43\x42", 2); /* message-format 0, unsettled */
    snprintf(id, sizeof id, "%04x-%08x-%04x", (unsigned)c->index & 0xffff, c->sent, slot & 0xffff);
    size_t list = open_list(c, 0x73, 0xd0, has_body ? 7 : 5);
    put_string(c, id);
    put_byte(c, 0x40);
    put_string(c, target);
    put_string(c, subject);
    put_string(c, c->reply_to);
    if (has_body) {
        put_byte(c, 0x40);
        put_variable(c, 0xa3, 0xb3, "application/json", 16);
    }
    close_list(c, list);
    const char *end = line.text + line.length, *tab = memchr(line.text, '\t', line.length);
    const char *rest = !by_device ? line.text : tab ? tab + 1 : end;
    if (by_device) {
        /* Names of devices and gateways are short here. */
        size_t length = (size_t)((tab ? tab : end) - line.text), more = argument ? strlen(argument) + 4 + (size_t)(end - rest) : 0;
        put(c, "\x00\x53\x74\xc1", 4);
        put_byte(c, 14 + (unsigned)(length + more));
        put_byte(c, argument ? 4 : 2);
        put_string(c, "device_id");
        put_variable(c, 0xa1, 0xb1, line.text, length);
        if (argument) {
            put_string(c, argument);
            put_variable(c, 0xa1, 0xb1, rest, (size_t)(end - rest));
        }
    }
    if (has_body) {
        put(c, "\x00\x53\x75", 3);
        put_variable(c, 0xa0, 0xb0, rest, (size_t)(end - rest));
    }
    close_frame(c, frame);
}

/* --- reading --- */

static uint32_t get_u32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, 4);
    return ntohl(value);
}

/* Skips one encoded value; the server is not trusted to be right, but a wrong one ends the run. */
static uint8_t *skip(uint8_t *at, uint8_t *end) {
    if (at >= end) die("truncated value");
    uint8_t code = *at++;
    if (code == 0) return skip(skip(at, end), end);
    size_t length = 0;
    switch (code >> 4) {
    case 4: length = 0; break;
    case 5: length = 1; break;
    case 6: length = 2; break;
    case 7: length = 4; break;
    case 8: length = 8; break;
    case 9: length = 16; break;
    case 0xa: case 0xc: case 0xe: length = 1u + *at; break;
    case 0xb: case 0xd: case 0xf: length = 4u + get_u32(at); break;
    default: die("unknown type %02x", code);
    }
    if (length > (size_t)(end - at)) die("truncated value");
    return at + length;
}

/* Opens a list or map: `at` becomes its first item, the count is returned. */
static uint32_t enter(uint8_t **at) {
    uint8_t *p = *at;
    switch (*p) {
    case 0x45: *at = p + 1; return 0;
    case 0xc0: case 0xc1: *at = p + 3; return p[2];
    case 0xd0: case 0xd1: *at = p + 9; return get_u32(p + 5);
    }
    die("not a list: %02x", *p);
    return 0;
}

static uint32_t number(const uint8_t *at) {
    switch (*at) {
    case 0x43: case 0x44: case 0x40: return 0;
    case 0x50: case 0x52: case 0x53: case 0x54: case 0x55: return at[1];
    case 0x70: case 0x71: return get_u32(at + 1);
    case 0x80: case 0x81: return get_u32(at + 5);
    }
    die("not a number: %02x", *at);
    return 0;
}

static bool is_true(const uint8_t *at) { return *at == 0x41 || (*at == 0x56 && at[1]); }

/* Finds field `index` of the list at `at`, NULL if it is absent or null. */
static uint8_t *field(uint8_t *at, uint8_t *end, uint32_t index) {
    uint32_t count = enter(&at);
    if (index >= count) return NULL;
    while (index--) at = skip(at, end);
    return *at == 0x40 ? NULL : at;
}

static void on_flow(connection_t *c, uint8_t *list, uint8_t *end) {
    uint8_t *next_in = field(list, end, 0), *window = field(list, end, 1);
    uint8_t *handle = field(list, end, 4), *count = field(list, end, 5), *credit = field(list, end, 6);
    if (window) c->window_limit = (next_in ? number(next_in) : 0) + number(window);
    /* Each side numbers its handles itself; the server answers in order, so its handle 1 is the request link. */
    if (handle && number(handle) == 1 && credit) c->credit_limit = (count ? number(count) : 0) + number(credit);
}

static void on_reply(connection_t *c, uint8_t *list, uint8_t *end, uint64_t now) {
    uint8_t *id = field(list, end, 1), *settled = field(list, end, 4), *more = field(list, end, 5);
    if (more && is_true(more)) die("a reply in several frames is not expected");
    if (!id || number(id) != c->replies) die("delivery-id out of order");
    if (!(settled && is_true(settled))) {
        if (!c->unsettled++) c->first_unsettled = c->replies;
    }
    c->replies++;
    c->reply_credit_left--;
    unsigned status = 0;
    long slot = -1;
    for (uint8_t *at = skip(list, end); at < end;) {
        uint8_t code = at[2];
        at += 3;
        if (code == 0x73) {
            uint8_t *correlation = field(at, end, 5);
            if (!correlation || *correlation != 0xa1 || correlation[1] != 18) die("no correlation-id of ours");
            slot = strtol((char[]){(char)correlation[16], (char)correlation[17], (char)correlation[18], (char)correlation[19], 0}, NULL, 16);
            if (slot >= MAX_IN_FLIGHT || c->started[slot] == 0) die("a reply that nobody waits for");
            char sent[9];
            snprintf(sent, sizeof sent, "%08x", c->slot_of[slot]);
            if (memcmp(sent, correlation + 7, 8)) die("a reply to another request");
        } else if (code == 0x74) {
            uint8_t *item = at;
            for (uint32_t count = enter(&item) / 2; count--;) {
                uint8_t *value = skip(item, end);
                if (item[1] == 6 && !memcmp(item + 2, "status", 6)) status = number(value);
                item = skip(value, end);
            }
        }
        at = skip(at, end);
    }
    if (slot < 0) die("no correlation-id");
    if (counting) {
        record_latency(now - c->started[slot]);
        per_connection[c->index]++;
        statuses[status < 1000 ? status : 999]++;
    }
    c->started[slot] = 0;
    c->free_slots[c->free_count++] = (uint32_t)slot;
    c->in_flight--;
    total_in_flight--;
}

static void on_frame(connection_t *c, uint8_t *frame, uint32_t size, uint64_t now) {
    if (size == 8) return; /* heartbeat */
    uint8_t *at = frame + 4u * frame[4], *end = frame + size;
    uint8_t code = at[2];
    at += 3;
    switch (code) {
    case 0x13: on_flow(c, at, end); break;
    case 0x14: on_reply(c, at, end, now); break;
    case 0x15: {
        uint8_t *state = field(at, end, 4);
        if (state && state[2] != 0x24) die("a request was not accepted");
        break;
    }
    default: die("unexpected performative %02x", code);
    }
}

/* --- setting up, blocking --- */

static void flush(connection_t *c) {
    while (c->output_sent < c->output_length) {
        ssize_t n = send(c->fd, c->output + c->output_sent, c->output_length - c->output_sent, MSG_NOSIGNAL);
        if (n < 0) die("send: %s", strerror(errno));
        c->output_sent += (size_t)n;
    }
    c->output_length = c->output_sent = 0;
}

static void read_exactly(connection_t *c, uint8_t *into, size_t length) {
    while (length) {
        ssize_t n = recv(c->fd, into, length, 0);
        if (n <= 0) die("the server closed the connection");
        into += n;
        length -= (size_t)n;
    }
}

/* Reads frames up to one with the given performative. */
static span_t await(connection_t *c, unsigned code) {
    for (;;) {
        read_exactly(c, c->input, 4);
        uint32_t size = get_u32(c->input);
        if (size < 8 || size > INPUT_SIZE) die("bad frame");
        read_exactly(c, c->input + 4, size - 4);
        if (size == 8) continue;
        uint8_t *at = c->input + 4u * c->input[4], *end = c->input + size;
        if (at[2] == code) return (span_t){at + 3, end};
        if (at[2] == 0x13) on_flow(c, at + 3, end);
        else die("performative %02x instead of %02x", at[2], code);
    }
}

static void await_header(connection_t *c, const char *header) {
    read_exactly(c, c->input, 8);
    if (memcmp(c->input, header, 8)) die("another protocol header");
}

static void set_up(connection_t *c, const char *host, int port, const char *user, const char *password) {
    c->fd = connect_to(host, port);
    c->input = malloc(INPUT_SIZE);
    c->output_size = 1 << 16;
    c->output = malloc(c->output_size);
    snprintf(c->reply_to, sizeof c->reply_to, "%s/bench-%d-%d", target, (int)getpid(), c->index);
    for (int i = 0; i < in_flight_goal; i++) c->free_slots[c->free_count++] = (uint32_t)i;

    put(c, "AMQP\3\1\0\0", 8);
    flush(c);
    await_header(c, "AMQP\3\1\0\0");
    await(c, 0x40);
    char response[512];
    int length = snprintf(response, sizeof response, "%c%s%c%s", 0, user, 0, password);
    size_t frame = open_frame(c, 1), list = open_list(c, 0x41, 0xd0, 2);
    put_variable(c, 0xa3, 0xb3, "PLAIN", 5);
    put_variable(c, 0xa0, 0xb0, response, (size_t)length);
    close_list(c, list);
    close_frame(c, frame);
    flush(c);
    span_t outcome = await(c, 0x44);
    uint8_t *result = field(outcome.at, outcome.end, 0);
    if (!result || number(result) != 0) die("the server refused the login");

    put(c, "AMQP\0\1\0\0", 8);
    frame = open_frame(c, 0);
    list = open_list(c, 0x10, 0xd0, 3);
    put_string(c, "bench");
    put_byte(c, 0x40);
    put_uint(c, 1 << 16); /* max-frame-size */
    close_list(c, list);
    close_frame(c, frame);
    flush(c);
    await_header(c, "AMQP\0\1\0\0");
    await(c, 0x10);

    frame = open_frame(c, 0);
    list = open_list(c, 0x11, 0xd0, 4);
    put_byte(c, 0x40);
    put_uint(c, 0);
    put_uint(c, 2147483647u);
    put_uint(c, 2147483647u);
    close_list(c, list);
    close_frame(c, frame);
    flush(c);
    span_t begin = await(c, 0x11);
    uint8_t *first = field(begin.at, begin.end, 1), *window = field(begin.at, begin.end, 2);
    if (!first || number(first) != 0) die("the server's transfer ids do not start at 0");
    c->window_limit = window ? number(window) : 0;

    put_attach(c, 0, true);
    flush(c);
    span_t attached = await(c, 0x12);
    if (!field(attached.at, attached.end, 5)) die("the reply link was refused");
    put_flow(c);
    put_attach(c, 1, false);
    flush(c);
    attached = await(c, 0x12);
    if (!field(attached.at, attached.end, 6)) die("the request link was refused");
    while (c->credit_limit == 0) {
        read_exactly(c, c->input, 4);
        uint32_t size = get_u32(c->input);
        if (size < 8 || size > INPUT_SIZE) die("bad frame");
        read_exactly(c, c->input + 4, size - 4);
        on_frame(c, c->input, size, 0);
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
}

/* --- the load --- */

static void fill(connection_t *c) {
    uint64_t now = 0;
    while (!draining && c->in_flight < (uint32_t)in_flight_goal && (int32_t)(c->credit_limit - c->sent) > 0 &&
           (int32_t)(c->window_limit - c->sent) > 0) {
        if (once && next_line == line_count) {
            draining = true;
            break;
        }
        if (!now) now = now_ns();
        if (interval && next_due > now) break;
        uint32_t slot = c->free_slots[--c->free_count];
        c->started[slot] = interval ? next_due : now;
        next_due += interval;
        c->slot_of[slot] = c->sent;
        put_request(c, lines[next_line++ % line_count], slot);
        c->sent++;
        c->in_flight++;
        total_in_flight++;
    }
}

static void write_out(connection_t *c, int poll) {
    while (c->output_sent < c->output_length) {
        ssize_t n = send(c->fd, c->output + c->output_sent, c->output_length - c->output_sent, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) die("send: %s", strerror(errno));
            if (!c->writable) {
                struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
                epoll_ctl(poll, EPOLL_CTL_MOD, c->fd, &event);
                c->writable = true;
            }
            return;
        }
        c->output_sent += (size_t)n;
    }
    c->output_length = c->output_sent = 0;
    if (c->writable) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        epoll_ctl(poll, EPOLL_CTL_MOD, c->fd, &event);
        c->writable = false;
    }
}

static void read_in(connection_t *c) {
    ssize_t n = recv(c->fd, c->input + c->input_length, INPUT_SIZE - c->input_length, 0);
    if (n == 0) die("the server closed a connection");
    if (n < 0) {
        if (errno == EAGAIN) return;
        die("recv: %s", strerror(errno));
    }
    c->input_length += (size_t)n;
    uint64_t now = now_ns();
    size_t at = 0;
    while (c->input_length - at >= 8) {
        uint32_t size = get_u32(c->input + at);
        if (size < 8 || size > INPUT_SIZE) die("bad frame");
        if (c->input_length - at < size) break;
        on_frame(c, c->input + at, size, now);
        at += size;
    }
    memmove(c->input, c->input + at, c->input_length - at);
    c->input_length -= at;
    if (c->unsettled) {
        size_t frame = open_frame(c, 0), list = open_list(c, 0x15, 0xd0, 5);
        put_byte(c, 0x41); /* role receiver */
        put_uint(c, c->first_unsettled);
        put_uint(c, c->replies - 1);
        put_byte(c, 0x41); /* settled */
        put(c, "\x00\x53\x24\x45", 4);
        close_list(c, list);
        close_frame(c, frame);
        c->unsettled = 0;
    }
    if (c->reply_credit_left <= REPLY_CREDIT / 2) put_flow(c);
}

int main(int argc, char **argv) {
    if (argc != 12 && argc != 13)
        die("usage: amqp_load HOST PORT USER PASSWORD TARGET KIND FILE CONNECTIONS IN_FLIGHT WARM_UP SECONDS [RATE]");
    target = argv[5];
    bool is_body = !strcmp(argv[6], "body");
    by_device = !is_body;
    if (!strcmp(argv[6], "set-last-gw")) argument = "gateway_id";
    if (!strcmp(argv[6], "set-cmd-handling-adapter-instance")) argument = "adapter_instance_id";
    has_body = is_body || !strncmp(argv[6], "get-cmd-", 8);
    subject = is_body ? "get" : strcmp(argv[6], "device") ? argv[6] : "assert";
    read_lines(argv[7]);
    connection_count = atoi(argv[8]);
    in_flight_goal = atoi(argv[9]);
    double warm_up = atof(argv[10]), seconds = atof(argv[11]);
    once = seconds == 0;
    if (argc == 13) interval = (uint64_t)(1e9 / atof(argv[12]));
    for (size_t i = 0; by_device && !has_body && i < line_count; i++)
        if (lines[i].length > 200) die("a device id is too long for this client");
    if (connection_count < 1 || in_flight_goal < 1 || in_flight_goal > MAX_IN_FLIGHT) die("bad numbers");

    connections = calloc((size_t)connection_count, sizeof *connections);
    per_connection = calloc((size_t)connection_count, sizeof *per_connection);
    int poll = epoll_create1(0);
    for (int i = 0; i < connection_count; i++) {
        connections[i].index = i;
        set_up(&connections[i], argv[1], atoi(argv[2]), argv[3], argv[4]);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, connections[i].fd, &event);
    }

    int timer = -1;
    if (interval) {
        timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
        struct timespec period = {.tv_sec = (time_t)(interval / 1000000000), .tv_nsec = (long)(interval % 1000000000)};
        struct itimerspec spec = {.it_interval = period, .it_value = period};
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
        if (timer < 0 || timerfd_settime(timer, 0, &spec, NULL) || epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event))
            die("no timer");
        next_due = now_ns();
    }
    uint64_t start = now_ns(), begin = start + (uint64_t)(warm_up * 1e9);
    uint64_t stop = once ? UINT64_MAX : begin + (uint64_t)(seconds * 1e9), stopped = 0;
    double processor = 0;
    if (once) {
        counting = true;
        announce_start();
        processor = processor_seconds();
        begin = now_ns();
    }
    for (int i = 0; i < connection_count; i++) {
        fill(&connections[i]);
        write_out(&connections[i], poll);
    }
    struct epoll_event events[64];
    while (total_in_flight || !draining) {
        int ready = epoll_wait(poll, events, 64, 5000);
        if (ready == 0) die("no reply within five seconds");
        for (int i = 0; i < ready; i++) {
            connection_t *c = events[i].data.ptr;
            if (!c) { /* the timer: whoever is next sends what is due */
                static int turn;
                uint64_t expired;
                if (read(timer, &expired, sizeof expired) > 0)
                    for (int j = 0; j < connection_count; j++) {
                        connection_t *next = &connections[turn++ % connection_count];
                        fill(next);
                        write_out(next, poll);
                        if (next_due > now_ns()) break;
                    }
                continue;
            }
            if (events[i].events & EPOLLIN) read_in(c);
            fill(c);
            write_out(c, poll);
        }
        uint64_t now = now_ns();
        if (!counting && !stopped && now >= begin) {
            counting = true;
            announce_start();
            reset_counts();
            memset(per_connection, 0, (size_t)connection_count * sizeof *per_connection);
            processor = processor_seconds();
            begin = now_ns();
        }
        if (counting && now >= stop) {
            counting = false;
            draining = true;
            stopped = now;
            print_result((double)(now - begin) / 1e9, processor_seconds() - processor, per_connection, connection_count);
        }
    }
    if (!stopped)
        print_result((double)(now_ns() - begin) / 1e9, processor_seconds() - processor, per_connection, connection_count);
    return 0;
}
