/*
 * Attaches a kernel NBD device over netlink, and gives it a new connection when its server is gone:
 * nbd-client(8) of Debian 12 can do the first but not the second.
 *
 *   nbd-attach connect INDEX SOCKET EXPORT    /dev/nbdINDEX, to EXPORT at the unix socket SOCKET
 *   nbd-attach reconnect INDEX SOCKET EXPORT  the same device goes on with a new server
 *
 * While it has no connection the device holds its requests for a minute; one that the old server
 * took and did not answer is sent again after TIMEOUT seconds.
 */
#include <endian.h>
#include <err.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <linux/netlink.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { TIMEOUT = 8, DEAD_CONNECTION_TIMEOUT = 60 };
enum { FIXED_NEWSTYLE = 1, NO_ZEROES = 2, OPT_GO = 7, REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };

struct export {
    uint64_t size;
    uint16_t flags;
};

static void get(int fd, void *buffer, size_t length) {
    for (char *at = buffer; length > 0;) {
        ssize_t done = read(fd, at, length);
        if (done <= 0)
            errx(1, "the server hung up");
        at += done;
        length -= done;
    }
}

static void put(int fd, const void *buffer, size_t length) {
    if (write(fd, buffer, length) != (ssize_t)length)
        err(1, "cannot write to the server");
}

/* Connects, and asks for the export: the fixed newstyle handshake with NBD_OPT_GO. */
static int handshake(const char *path, const char *name, struct export *export) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        errx(1, "%s: too long", path);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        err(1, "cannot connect to %s", path);
    char greeting[18];
    get(fd, greeting, sizeof greeting);
    if (memcmp(greeting, "NBDMAGICIHAVEOPT", 16) != 0)
        errx(1, "%s: not an NBD server", path);
    struct {
        uint32_t client_flags;
        char magic[8];
        uint32_t option, length, name_length;
    } __attribute__((packed)) request = {
        htobe32(FIXED_NEWSTYLE | NO_ZEROES), "", htobe32(OPT_GO),
        htobe32(4 + strlen(name) + 2),       htobe32(strlen(name)),
    };
    memcpy(request.magic, "IHAVEOPT", 8);
    uint16_t wanted_infos = 0;
    put(fd, &request, sizeof request);
    put(fd, name, strlen(name));
    put(fd, &wanted_infos, sizeof wanted_infos);
    for (;;) {
        struct {
            uint64_t magic;
            uint32_t option, type, length;
        } __attribute__((packed)) reply;
        char data[4096];
        get(fd, &reply, sizeof reply);
        uint32_t type = be32toh(reply.type), length = be32toh(reply.length);
        if (length > sizeof data)
            errx(1, "a reply of %u bytes", length);
        get(fd, data, length);
        if (type == REP_ACK)
            return fd;
        if (type != REP_INFO)
            errx(1, "the server refuses the export %s (%#x)", name, type);
        if (length == 12 && data[0] == 0 && data[1] == INFO_EXPORT) {
            memcpy(&export->size, data + 2, 8);
            memcpy(&export->flags, data + 10, 2);
            export->size = be64toh(export->size);
            export->flags = be16toh(export->flags);
        }
    }
}

struct message {
    struct nlmsghdr header;
    struct genlmsghdr generic;
    char data[512];
};

static void *add(struct message *message, int type, const void *data, size_t length) {
    struct nlattr *attribute = (void *)((char *)message + NLMSG_ALIGN(message->header.nlmsg_len));
    attribute->nla_type = type;
    attribute->nla_len = NLA_HDRLEN + length;
    if (length > 0)
        memcpy((char *)attribute + NLA_HDRLEN, data, length);
    message->header.nlmsg_len =
        NLMSG_ALIGN(message->header.nlmsg_len) + NLA_ALIGN(attribute->nla_len);
    return attribute;
}

static void add_u64(struct message *message, int type, uint64_t value) {
    add(message, type, &value, sizeof value);
}

/* Sends a command and waits for the kernel's answer; the id of a family, if it names one. */
static int command(int fd, struct message *message, int family, int number) {
    message->header.nlmsg_type = family;
    message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    message->generic.cmd = number;
    message->generic.version = 1;
    if (send(fd, message, message->header.nlmsg_len, 0) < 0)
        err(1, "cannot send to the kernel");
    int id = 0;
    for (;;) {
        char buffer[8192] __attribute__((aligned(8)));
        ssize_t length = recv(fd, buffer, sizeof buffer, 0);
        if (length < 0)
            err(1, "no answer from the kernel");
        struct nlmsghdr *header = (void *)buffer;
        for (; NLMSG_OK(header, length); header = NLMSG_NEXT(header, length)) {
            if (header->nlmsg_type == NLMSG_ERROR) {
                struct nlmsgerr *error = NLMSG_DATA(header);
                if (error->error != 0)
                    errx(1, "the kernel refuses: %s", strerror(-error->error));
                return id;
            }
            char *at = (char *)NLMSG_DATA(header) + GENL_HDRLEN;
            char *end = (char *)header + header->nlmsg_len;
            while (header->nlmsg_type == GENL_ID_CTRL && at + NLA_HDRLEN <= end) {
                struct nlattr *attribute = (void *)at;
                if (attribute->nla_type == CTRL_ATTR_FAMILY_ID)
                    id = *(uint16_t *)(at + NLA_HDRLEN);
                at += NLA_ALIGN(attribute->nla_len);
            }
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 5)
        errx(2, "usage: nbd-attach connect|reconnect INDEX SOCKET EXPORT");
    int again = strcmp(argv[1], "reconnect") == 0;
    uint32_t index = atoi(argv[2]);
    struct export export = {0};
    uint32_t server = handshake(argv[3], argv[4], &export);

    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
    if (fd < 0)
        err(1, "netlink");
    struct message ask = {.header.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN)};
    add(&ask, CTRL_ATTR_FAMILY_NAME, "nbd", 4);
    int family = command(fd, &ask, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);

    struct message message = {.header.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN)};
    add(&message, NBD_ATTR_INDEX, &index, sizeof index);
    if (!again) {
        add_u64(&message, NBD_ATTR_SIZE_BYTES, export.size);
        add_u64(&message, NBD_ATTR_BLOCK_SIZE_BYTES, 512);
        add_u64(&message, NBD_ATTR_SERVER_FLAGS, export.flags);
    }
    add_u64(&message, NBD_ATTR_TIMEOUT, TIMEOUT);
    add_u64(&message, NBD_ATTR_DEAD_CONN_TIMEOUT, DEAD_CONNECTION_TIMEOUT);
    char *sockets = add(&message, NBD_ATTR_SOCKETS | NLA_F_NESTED, NULL, 0);
    char *item = add(&message, NBD_SOCK_ITEM | NLA_F_NESTED, NULL, 0);
    add(&message, NBD_SOCK_FD, &server, sizeof server);
    char *end = (char *)&message + message.header.nlmsg_len;
    ((struct nlattr *)sockets)->nla_len = end - sockets;
    ((struct nlattr *)item)->nla_len = end - item;
    command(fd, &message, family, again ? NBD_CMD_RECONFIGURE : NBD_CMD_CONNECT);
    return 0;
}
