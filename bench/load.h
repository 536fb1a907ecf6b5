/* What both load clients share: lines of a file, a histogram of latencies, the clock, the end. */

#ifndef KAMADO_LOAD_H
#define KAMADO_LOAD_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
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

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- the lines of a file, one request each --- */

typedef struct {
    const char *text;
    uint32_t length;
} line_t;

static line_t *lines;
static size_t line_count;

static void read_lines(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die("cannot open %s", path);
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(size + 1);
    if (fread(text, 1, size, file) != size) die("cannot read %s", path);
    fclose(file);
    text[size] = '\n';
    size_t count = 0;
    for (size_t i = 0; i < size; i++) count += text[i] == '\n';
    lines = malloc((count + 1) * sizeof *lines);
    for (char *start = text; start < text + size;) {
        char *end = memchr(start, '\n', (size_t)(text + size + 1 - start));
        if (end > start) lines[line_count++] = (line_t){start, (uint32_t)(end - start)};
        start = end + 1;
    }
    if (!line_count) die("%s is empty", path);
}

/* --- latencies: buckets of one microsecond up to a quarter of a second --- */

#define BUCKETS 250000
static uint32_t histogram[BUCKETS];
static uint64_t latency_count, latency_max;

static void record_latency(uint64_t ns) {
    uint64_t us = ns / 1000;
    histogram[us < BUCKETS ? us : BUCKETS - 1]++;
    latency_count++;
    if (us > latency_max) latency_max = us;
}

static unsigned quantile(double share) {
    uint64_t wanted = (uint64_t)(share * (double)latency_count), seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((seen += histogram[i]) > wanted) return i;
    return BUCKETS;
}

static uint64_t statuses[1000];

static void reset_counts(void) {
    memset(histogram, 0, sizeof histogram);
    memset(statuses, 0, sizeof statuses);
    latency_count = latency_max = 0;
}

static double processor_seconds(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* Tells the driver to read the server's processor time now. */
static void announce_start(void) {
    puts("start");
    fflush(stdout);
}

static void print_result(double seconds, double processor, const uint64_t *per_connection, int connections) {
    uint64_t least = UINT64_MAX, most = 0;
    for (int i = 0; i < connections; i++) {
        if (per_connection[i] < least) least = per_connection[i];
        if (per_connection[i] > most) most = per_connection[i];
    }
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"p50_us\": %u, \"p99_us\": %u, \"max_us\": %llu, "
           "\"client_cpu_seconds\": %.4f, \"least_per_connection\": %llu, \"most_per_connection\": %llu, \"statuses\": {",
           (unsigned long long)latency_count, seconds, quantile(0.5), quantile(0.99),
           (unsigned long long)latency_max, processor, (unsigned long long)least, (unsigned long long)most);
    bool first = true;
    for (int status = 0; status < 1000; status++)
        if (statuses[status]) {
            printf("%s\"%d\": %llu", first ? "" : ", ", status, (unsigned long long)statuses[status]);
            first = false;
        }
    puts("}}");
    fflush(stdout);
}

/* --- sockets --- */

static int connect_to(const char *host, int port) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) die("%s is no IPv4 address", host);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) die("cannot connect: %s", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

#endif
