/* A connection, and the events of an answer in both dialects, said onto what will be sent; a part of fastserver.c. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

typedef int64_t ns;

struct conn {
    char *in;
    size_t len, room, whole; /* bytes that have come, have room, make the request */
    size_t head;
    ns arrived, first, due;
    long output, sent, prompt, before;
    int chat, life;
    char who[160];
};

static char out[8192];
static size_t outlen;

/* Text onto what will be sent. */
static void say(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    outlen += vsnprintf(out + outlen, sizeof out - outlen, format, rest);
    va_end(rest);
}

/* The events before the first word. */
static void opening(struct conn *conn) {
    if (conn->chat) {
        say("data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"fast\",\"choices\":[{\"index\":0,"
            "\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n");
        return;
    }
    say("event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"type\":\"message\",\"role\":"
        "\"assistant\",\"model\":\"fast\",\"content\":[],\"stop_reason\":null,\"usage\":{\"input_tokens\":0,"
        "\"cache_creation_input_tokens\":%ld,\"cache_read_input_tokens\":%ld,\"output_tokens\":1}}}\n\n"
        "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\","
        "\"text\":\"\"}}\n\n", conn->prompt - conn->before, conn->before);
}

static void word(struct conn *conn) {
    if (conn->chat)
        say("data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"fast\",\"choices\":[{\"index\":0,"
            "\"delta\":{\"content\":\" word\"},\"finish_reason\":null}]}\n\n");
    else
        say("event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":"
            "\"text_delta\",\"text\":\" word\"}}\n\n");
}

/* The token account: of all prompts on a connection, each is taken to begin with the one before. */
static void usage(struct conn *conn) {
    if (conn->chat)
        say("\"usage\":{\"prompt_tokens\":%ld,\"completion_tokens\":%ld,\"total_tokens\":%ld,\"prompt_tokens_details\":"
            "{\"cached_tokens\":%ld}}", conn->prompt, conn->output, conn->prompt + conn->output, conn->before);
    else
        say("\"usage\":{\"input_tokens\":0,\"cache_creation_input_tokens\":%ld,\"cache_read_input_tokens\":%ld,"
            "\"output_tokens\":%ld}", conn->prompt - conn->before, conn->before, conn->output);
}

static void closing(struct conn *conn) {
    if (conn->chat) {
        say("data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"fast\",\"choices\":[{\"index\":0,"
            "\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"created\":1,"
            "\"model\":\"fast\",\"choices\":[],");
        usage(conn);
        say("}\n\ndata: [DONE]\n\n");
    } else {
        say("event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\nevent: message_delta\n"
            "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},");
        usage(conn);
        say("}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n");
    }
}
