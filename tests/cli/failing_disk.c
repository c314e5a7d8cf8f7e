/* A disk that fails on request: preloaded into the program under test, it makes the Nth call of a kind fail on files below a path.
 *
 * DISK_CALL   write, fsync, link, rename, open (for writing), mkdir or read
 * DISK_BELOW  paths that begin with this
 * DISK_NTH    which of these calls fails, from 1
 * DISK_ERRNO  with what; 0 makes it do one byte of its work only
 * DISK_FULL   set: all later calls fail too
 * DISK_LOG    a file that gets a line for each failure, and for each fsync: the call, the inode, what it returned
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static void note(const char *call, ino_t inode, int result) {
    const char *path = getenv("DISK_LOG");
    char line[96];
    int length = snprintf(line, sizeof line, "%s %llu %d\n", call, (unsigned long long)inode, result);
    int log = path ? REAL(open64)(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (log >= 0) {
        if (REAL(write)(log, line, length) < 0) abort();
        close(log);
    }
}

static int below(const char *path) {
    const char *prefix = getenv("DISK_BELOW");
    return path && prefix && strncmp(path, prefix, strlen(prefix)) == 0;
}

/* Whether this call is the one to fail: then errno is set, or 0 for a short one. */
static int fails(const char *call, const char *path) {
    const char *wanted = getenv("DISK_CALL");
    if (!wanted || strcmp(wanted, call) != 0 || !below(path)) return 0;
    int nth = atoi(getenv("DISK_NTH")), now = atomic_fetch_add(&calls, 1) + 1;
    if (now != nth && !(now > nth && getenv("DISK_FULL"))) return 0;
    errno = atoi(getenv("DISK_ERRNO"));
    return 1;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

static int fd_fails(const char *call, int fd) {
    char path[PATH_MAX];
    int saved = errno, failing = fails(call, path_of(fd, path));
    if (!failing) errno = saved;
    else if (errno) note(call, 0, -errno);
    return failing;
}

static int path_fails(const char *call, const char *path) {
    int failing = fails(call, path);
    if (failing) note(call, 0, -errno);
    return failing;
}

ssize_t write(int fd, const void *bytes, size_t count) {
    if (fd_fails("write", fd)) {
        if (errno) return -1;
        return REAL(write)(fd, bytes, count ? 1 : 0);
    }
    return REAL(write)(fd, bytes, count);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return fd_fails("write", fd) && errno ? -1 : REAL(writev)(fd, parts, count);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t offset) {
    return fd_fails("write", fd) && errno ? -1 : REAL(pwrite64)(fd, bytes, count, offset);
}

ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t count, unsigned flags) {
    return fd_fails("write", to) && errno ? -1 : REAL(copy_file_range)(from, from_offset, to, to_offset, count, flags);
}

ssize_t read(int fd, void *bytes, size_t count) {
    if (fd_fails("read", fd)) {
        if (errno) return -1;
        return REAL(read)(fd, bytes, count ? 1 : 0);
    }
    return REAL(read)(fd, bytes, count);
}

ssize_t pread64(int fd, void *bytes, size_t count, off64_t offset) {
    return fd_fails("read", fd) && errno ? -1 : REAL(pread64)(fd, bytes, count, offset);
}

static int synced(int fd, int (*real)(int)) {
    struct stat of;
    char path[PATH_MAX];
    int known = fstat(fd, &of) == 0 && below(path_of(fd, path));
    int result = fd_fails("fsync", fd) ? -1 : real(fd);
    int saved = errno;
    if (known) note("synced", of.st_ino, result);
    errno = saved;
    return result;
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

int link(const char *from, const char *to) { return path_fails("link", to) ? -1 : REAL(link)(from, to); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    return path_fails("link", to) ? -1 : REAL(linkat)(from_dir, from, to_dir, to, flags);
}

int rename(const char *from, const char *to) { return path_fails("rename", to) ? -1 : REAL(rename)(from, to); }

int mkdir(const char *path, mode_t mode) { return path_fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }

static int opened(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    if ((flags & (O_WRONLY | O_RDWR)) && path_fails("open", path)) return -1;
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(REAL(open), path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(REAL(open64), path, flags, mode);
}
