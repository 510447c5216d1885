/* The upstream of `make bench-gateway`: fast enough not to be what is measured.
 *
 * upstream PORT CHUNKS PAUSE_MS answers each POST with a canned chat completion, or with a stream of CHUNKS chunks,
 * one each PAUSE_MS, where the body asks for `"stream": true`. GET /stats returns the number of POSTs served.
 * One thread, epoll, HTTP/1.1 with keep-alive, requests without pipelining, bodies with content-length.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS_MAX 8192
#define REQUEST_MAX 65536

struct connection {
    char *request;
    int length;
    int chunks_left;      /* of a running stream */
    long long next_ms;    /* when the next chunk is due */
};

static struct connection connections[CONNECTIONS_MAX];
static int streaming[CONNECTIONS_MAX], streaming_count;
static long served;
static int stream_chunks, pause_ms;

static const char PLAIN_BODY[] =
    "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1795494348,\"model\":\"llama-3-8b-instruct\","
    "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"A small river runs past the old mill and "
    "down to the sea. The model reads the whole question before it writes the first word.\"},\"logprobs\":null,"
    "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":25,\"total_tokens\":36}}";
static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

static long long get_now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void send_all(int fd, const char *data, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EAGAIN || errno == EINTR) continue;
            return;
        }
        data += sent;
        size -= sent;
    }
}

static void answer(int fd, const char *body) {
    char buffer[2048];
    int size = snprintf(buffer, sizeof buffer,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", strlen(body), body);
    send_all(fd, buffer, size);
}

static void send_frame(int fd, const char *json, int is_last) {
    char buffer[1024];
    int frame = (int)strlen(json) + 8;
    int size = snprintf(buffer, sizeof buffer, "%x\r\ndata: %s\n\n\r\n%s", frame, json, is_last ? "0\r\n\r\n" : "");
    send_all(fd, buffer, size);
}

static void stop_stream(int fd) {
    for (int index = 0; index < streaming_count; index++)
        if (streaming[index] == fd) {
            streaming[index] = streaming[--streaming_count];
            return;
        }
}

static void close_connection(int fd) {
    stop_stream(fd);
    free(connections[fd].request);
    memset(&connections[fd], 0, sizeof connections[fd]);
    close(fd);
}

/* Send the due chunks of all streams; the last one is followed by usage and [DONE]. */
static void advance_streams(long long now_ms) {
    for (int index = streaming_count - 1; index >= 0; index--) {
        int fd = streaming[index];
        struct connection *connection = &connections[fd];
        if (connection->next_ms > now_ms) continue;
        int number = stream_chunks - connection->chunks_left + 1;
        char json[512];
        snprintf(json, sizeof json,
            "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1795494348,"
            "\"model\":\"llama-3-8b-instruct\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" river\"},"
            "\"logprobs\":null,\"finish_reason\":%s}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":%d,"
            "\"total_tokens\":%d}}",
            connection->chunks_left == 1 ? "\"stop\"" : "null", number, 11 + number);
        send_frame(fd, json, 0);
        connection->next_ms += pause_ms;
        if (--connection->chunks_left > 0) continue;
        snprintf(json, sizeof json,
            "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1795494348,"
            "\"model\":\"llama-3-8b-instruct\",\"choices\":[],\"usage\":{\"prompt_tokens\":11,"
            "\"completion_tokens\":%d,\"total_tokens\":%d}}", number, 11 + number);
        send_frame(fd, json, 0);
        send_frame(fd, "[DONE]", 1);
        streaming[index] = streaming[--streaming_count];
    }
}

static void handle_request(int fd, const char *request) {
    if (strncmp(request, "POST", 4) != 0) {
        char body[64];
        snprintf(body, sizeof body, "%ld", served);
        answer(fd, body);
        return;
    }
    served++;
    if (strstr(request, "\"stream\":true") == NULL && strstr(request, "\"stream\": true") == NULL) {
        answer(fd, PLAIN_BODY);
        return;
    }
    send_all(fd, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    connections[fd].chunks_left = stream_chunks;
    connections[fd].next_ms = get_now_ms() + pause_ms;
    streaming[streaming_count++] = fd;
}

static void read_request(int fd) {
    struct connection *connection = &connections[fd];
    if (connection->request == NULL) connection->request = malloc(REQUEST_MAX + 1);
    ssize_t received = recv(fd, connection->request + connection->length, REQUEST_MAX - connection->length, 0);
    if (received <= 0) {
        if (received < 0 && errno == EAGAIN) return;
        close_connection(fd);
        return;
    }
    connection->length += received;
    connection->request[connection->length] = 0;
    char *end = strstr(connection->request, "\r\n\r\n");
    if (end == NULL) return;
    char *field = strcasestr(connection->request, "content-length:");
    int body = field != NULL && field < end ? atoi(field + 15) : 0;
    if (connection->length < end + 4 - connection->request + body) return;
    connection->length = 0;
    handle_request(fd, connection->request);
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    stream_chunks = atoi(argv[2]);
    pause_ms = atoi(argv[3]);
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("bench upstream");
        return 1;
    }
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[256];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int count = epoll_wait(poll, events, 256, streaming_count > 0 ? 1 : -1);
        for (int index = 0; index < count; index++) {
            int fd = events[index].data.fd;
            if (fd != listener) {
                read_request(fd);
                continue;
            }
            while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                if (fd >= CONNECTIONS_MAX) {
                    close(fd);
                    continue;
                }
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                event.events = EPOLLIN;
                event.data.fd = fd;
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
            }
        }
        if (streaming_count > 0) advance_streams(get_now_ms());
    }
}
