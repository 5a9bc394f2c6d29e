/*
 * The floor for capturing a tree: one pass over it in C, with as little as the kernel allows.
 *
 *     tree_pass walk DIRECTORY    nftw, which calls lstat for every entry
 *     tree_pass read DIRECTORY    the same, and open, read and close for every regular file
 *
 * Prints the seconds of the pass, the regular files and the bytes in them. The time to start this program
 * is not in the seconds.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Page-aligned and touched before the clock runs: anything else is several times slower. */
enum { BUFFER_BYTES = 1 << 20, PAGE_BYTES = 4096, MAX_DESCRIPTORS = 64 };

static char *buffer;
static int reads_content;
static long long files, bytes;

static int visit(const char *path, const struct stat *info, int kind, struct FTW *place)
{
    (void)place;
    if (kind != FTW_F || !S_ISREG(info->st_mode))
        return 0;
    files++;
    if (!reads_content) {
        bytes += info->st_size;
        return 0;
    }
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (descriptor < 0)
        return errno;
    ssize_t got;
    do {
        got = read(descriptor, buffer, BUFFER_BYTES);
        if (got < 0)
            return errno;
        bytes += got;
    } while (got == BUFFER_BYTES);
    close(descriptor);
    return 0;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int count, char **arguments)
{
    if (count != 3 || (strcmp(arguments[1], "walk") && strcmp(arguments[1], "read"))) {
        fprintf(stderr, "usage: tree_pass walk|read DIRECTORY\n");
        return 2;
    }
    reads_content = !strcmp(arguments[1], "read");
    if (posix_memalign((void **)&buffer, PAGE_BYTES, BUFFER_BYTES))
        return 1;
    memset(buffer, 1, BUFFER_BYTES);
    double begin = now();
    int failure = nftw(arguments[2], visit, MAX_DESCRIPTORS, FTW_PHYS);
    double seconds = now() - begin;
    if (failure) {
        fprintf(stderr, "tree_pass: %s: %s\n", arguments[2], strerror(failure < 0 ? errno : failure));
        return 1;
    }
    printf("%.6f %lld %lld\n", seconds, files, bytes);
    return 0;
}
