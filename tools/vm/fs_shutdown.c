/* fs-shutdown DIR FILE...: makes the files and their directories durable, as the host's write-back does sooner or
 * later, and shuts the file system of DIR down at once: nothing else in memory reaches the disk. */

#include <fcntl.h>
#include <libgen.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* XFS_IOC_GOINGDOWN and EXT4_IOC_SHUTDOWN, which are one. */
#define SHUTDOWN _IOR('X', 125, uint32_t)
/* The journal is not written either. */
#define AS_IT_IS 2

static int sync_file(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fsync(fd) != 0) {
        perror(path);
        return 1;
    }
    close(fd);
    return 0;
}

int main(int argc, char **argv)
{
    uint32_t how = AS_IT_IS;
    if (argc < 2) {
        fprintf(stderr, "fs-shutdown DIR FILE...\n");
        return 2;
    }
    for (int i = 2; i < argc; i++)
        if (sync_file(argv[i]) != 0 || sync_file(dirname(argv[i])) != 0)
            return 1;
    int dir = open(argv[1], O_RDONLY | O_DIRECTORY);
    if (dir < 0 || ioctl(dir, SHUTDOWN, &how) != 0) {
        perror(argv[1]);
        return 1;
    }
    return 0;
}
