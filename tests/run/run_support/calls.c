/* Makes the system calls that a container may not make, and says for each how it went: its name and
 * 0, or the number of the error. Where a call could do something, its arguments make it fail with
 * another error than EPERM and ENOSYS if a filter lets it pass. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void call(const char *name, long number, long a, long b, long c, long d)
{
    errno = 0;
    long got = syscall(number, a, b, c, d, 0, 0);
    printf("%s %d\n", name, got < 0 ? errno : 0);
    fflush(stdout);
}

static void clone_with(const char *name, unsigned long flags)
{
    errno = 0;
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid == 0)
        _exit(0);
    printf("%s %d\n", name, pid < 0 ? errno : 0);
    fflush(stdout);
    if (pid > 0)
        waitpid(pid, 0, 0);
}

int main(int argc, char **argv)
{
    if (argc > 1) {
        /* Locks what it is told to, until it is ended. */
        int fd = open(argv[1], O_RDONLY);
        if (fd < 0 || flock(fd, LOCK_EX) < 0)
            return 1;
        for (;;)
            pause();
    }
    call("keyctl", SYS_keyctl, 0, -4, 0, 0);
    call("add_key", SYS_add_key, 0, 0, 0, 0);
    call("request_key", SYS_request_key, 0, 0, 0, 0);
    call("io_uring_setup", SYS_io_uring_setup, 0, 0, 0, 0);
    call("io_uring_enter", SYS_io_uring_enter, -1, 0, 0, 0);
    call("userfaultfd", SYS_userfaultfd, -1, 0, 0, 0);
    call("bpf", SYS_bpf, -1, 0, 0, 0);
    call("perf_event_open", SYS_perf_event_open, 0, 0, 0, -1);
    call("mount", SYS_mount, 0, 0, 0, 0);
    call("umount2", SYS_umount2, 0, -1, 0, 0);
    call("fsopen", SYS_fsopen, 0, -1, 0, 0);
    call("open_tree", SYS_open_tree, -1, 0, -1, 0);
    call("setns", SYS_setns, -1, 0, 0, 0);
    call("open_by_handle_at", SYS_open_by_handle_at, -1, 0, 0, 0);
    call("kexec_load", SYS_kexec_load, 0, 1 << 20, 0, -1);
    call("init_module", SYS_init_module, 0, 0, 0, 0);
    call("delete_module", SYS_delete_module, 0, 0, 0, 0);
    call("reboot", SYS_reboot, 0, 0, 0, 0);
    call("swapon", SYS_swapon, 0, -1, 0, 0);
    call("settimeofday", SYS_settimeofday, 1, 0, 0, 0);
    call("clock_settime", SYS_clock_settime, -1, 0, 0, 0);
    call("acct", SYS_acct, 1, 0, 0, 0);
    call("quotactl", SYS_quotactl, -1, 0, 0, 0);
    call("move_pages", SYS_move_pages, 0, 1, 0, 0);
    call("pivot_root", SYS_pivot_root, 1, 1, 0, 0);
    call("syslog", SYS_syslog, -1, 0, 0, 0);
    call("ptrace", SYS_ptrace, -1, 0, 0, 0);
    call("process_vm_readv", SYS_process_vm_readv, getpid(), 0, 0, 0);
    call("name_to_handle_at", SYS_name_to_handle_at, -1, 0, 0, 0);
    call("chroot", SYS_chroot, 1, 0, 0, 0);
    call("socket_inet", SYS_socket, AF_INET, SOCK_STREAM, 0, 0);
    call("socket_unix", SYS_socket, AF_UNIX, SOCK_STREAM, 0, 0);
    call("socket_alg", SYS_socket, AF_ALG, SOCK_SEQPACKET, 0, 0);
    call("socket_vsock", SYS_socket, AF_VSOCK, SOCK_STREAM, 0, 0);
    call("personality_get", SYS_personality, 0xffffffff, 0, 0, 0);
    call("personality_norandom", SYS_personality, 0x0040000, 0, 0, 0);
    call("unshare_none", SYS_unshare, 0, 0, 0, 0);
    clone_with("clone", 0);
    clone_with("clone_user", CLONE_NEWUSER);
    clone_with("clone_net", CLONE_NEWNET);
    clone_with("clone_mount_pid", CLONE_NEWNS | CLONE_NEWPID);
    call("clone3", SYS_clone3, 0, 0, 0, 0);
    call("unknown", 2047, 0, 0, 0, 0);
    return 0;
}
