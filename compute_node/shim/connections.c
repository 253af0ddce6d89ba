/*
 * The shim's part for clients: connections that the endpoints accepted, and the writer's lease.
 *
 * An endpoint (control_plane/endpoints) accepts a client's connection and hands the descriptor to
 * the instance it chose: it connects to a unix socket on which this PostgreSQL listens, sends one
 * byte with the descriptor (SCM_RIGHTS, unix(7)), and waits for one byte. What PostgreSQL's accept()
 * then returns is the client's own connection, as if the client had come here by itself.
 *
 *  - With the byte that we send back the connection is PostgreSQL's. Until then the endpoint may
 *    withdraw it, by shutting the carrier down: our byte then fails, and we close the descriptor.
 *    The kernel lets exactly one of the two happen, so no client is ever served by two.
 *  - The carrier stays open in the process that serves the client, and there alone. Its end tells the
 *    endpoint that the session is over: until then the endpoint keeps a copy of the connection, so
 *    that it can end the sessions of a writer that was deposed while it was frozen.
 *  - Whatever else a carrier brings, PostgreSQL gets a connection that has ended: a client that hung
 *    up without a word. After an accept() that failed it would rest for 0.1 s, and accept nobody
 *    meanwhile (StreamConnection, pqcomm.c).
 *  - The postmaster waits for a carrier's message for as long, no longer. An endpoint sends it in the
 *    same moment as it connects.
 *
 * The lease: two words in a file that the agent keeps beside the page socket (compute_node/lease.py).
 * The first is the time (CLOCK_MONOTONIC, ns) until which this PostgreSQL may serve clients; 0 where
 * it needs no lease. While the second is not 0 no transaction begins: a writer makes way.
 * A client's message is held back while the lease has run out, or while it would begin a transaction
 * that must not. The words are read after the message was
 * received: what came after a lease ended is never answered under it, however long this process was
 * frozen in between. Nothing but messages over TCP is held, so the agent always gets through.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "shim.h"

enum {
	CARRIER_PATIENCE_MS = 100,
	LEASE_POLL_NS = 5 * 1000 * 1000,
	LEASE_UNTIL = 0,			/* the words of the lease */
	LEASE_DRAINING = 1,
	LEASE_WORDS = 2
};

static struct sockaddr_un handover = {.sun_family = AF_UNIX};	/* no path: there is none */
static const uint64_t *lease;	/* NULL: there is none */
static pid_t postmaster;
static int taken = -1, taken_by = -1;	/* of the postmaster: the last one, and its carrier */
static volatile const sig_atomic_t *proc_die_pending;	/* PostgreSQL's (miscadmin.h) */
static bool (*in_transaction)(void);	/* IsTransactionOrTransactionBlock (access/xact.h) */

static void
map_lease(const char *page_socket)
{
	char path[sizeof handover.sun_path + sizeof ".lease"];
	int fd;
	void *at;

	if (snprintf(path, sizeof path, "%s.lease", page_socket) >= (int) sizeof path)
		return;					/* too long for a socket: the other part of the shim says so */
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	at = mmap(NULL, LEASE_WORDS * sizeof *lease, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	if (at == MAP_FAILED)
		die("the file of the lease cannot be mapped");
	lease = at;
}

__attribute__((constructor)) static void
start(void)
{
	const char *path = getenv("BOREAL_HANDOVER"), *page_socket = getenv("BOREAL_PAGE_SOCKET");

	if (!dlsym(RTLD_DEFAULT, "UsedShmemSegAddr"))
		return;					/* not PostgreSQL */
	postmaster = getpid();
	if (page_socket && *page_socket)
		map_lease(page_socket);
	if (path && *path) {
		if (strlen(path) >= sizeof handover.sun_path)
			die("BOREAL_HANDOVER is too long for a unix socket");
		strcpy(handover.sun_path, path);
		if (page_socket && *page_socket && !lease)
			die("connections are handed over, but there is no file of the lease");
	}
	proc_die_pending = dlsym(RTLD_DEFAULT, "ProcDiePending");
	in_transaction = (bool (*)(void)) dlsym(RTLD_DEFAULT, "IsTransactionOrTransactionBlock");
	if (lease && (!proc_die_pending || !in_transaction))
		die("this PostgreSQL lacks a symbol the shim needs; it is made for version 16");
}

/* ---- connections that the endpoints accepted ------------------------------------------------- */

static bool
is_handover(int listener)
{
	struct sockaddr_un own;
	socklen_t length = sizeof own;

	if (!*handover.sun_path)
		return false;
	memset(&own, 0, sizeof own);
	return getsockname(listener, (struct sockaddr *) &own, &length) == 0
		&& own.sun_family == AF_UNIX
		&& strncmp(own.sun_path, handover.sun_path, sizeof own.sun_path) == 0;
}

static bool
wait_for_message(int carrier, int64_t deadline_ms)
{
	struct pollfd readable = {.fd = carrier, .events = POLLIN};
	int64_t left_ms = deadline_ms - now_ms();

	/* A signal to the postmaster ends the wait before its time; the caller looks again. */
	return left_ms > 0 && (poll(&readable, 1, (int) left_ms) > 0 || errno == EINTR);
}

/* The descriptor that came with the carrier's message; -1 if there was none, or more than one. */
static int
receive_descriptor(int carrier)
{
	const int64_t deadline_ms = now_ms() + CARRIER_PATIENCE_MS;
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	char byte;
	struct iovec data = {.iov_base = &byte, .iov_len = 1};
	/* CMSG_LEN leaves room for one. The kernel closes those beyond, and tells. */
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1,
		.msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))
	};
	const struct cmsghdr *header;
	int descriptor = -1;

	while (recvmsg(carrier, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) < 0)
		if ((errno != EAGAIN && errno != EINTR) || !wait_for_message(carrier, deadline_ms))
			return -1;
	header = CMSG_FIRSTHDR(&message);
	if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS
		&& header->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&descriptor, CMSG_DATA(header), sizeof descriptor);
	if (descriptor >= 0 && message.msg_flags & MSG_CTRUNC) {
		close(descriptor);
		descriptor = -1;
	}
	return descriptor;
}

/* Whether it is a client's connection. Tells its other end. */
static bool
is_connection(int descriptor, struct sockaddr_storage *peer, socklen_t *length)
{
	*length = sizeof *peer;
	return getpeername(descriptor, (struct sockaddr *) peer, length) == 0
		&& (peer->ss_family == AF_INET || peer->ss_family == AF_INET6);
}

/* From here on it is PostgreSQL's; false if the endpoint has withdrawn it. */
static bool
take(int carrier)
{
	const char byte = 0;

	fcntl(carrier, F_SETFD, FD_CLOEXEC);	/* it must end with the session, not with a program of its */
	return send(carrier, &byte, sizeof byte, MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof byte;
}

/* Once it has forked the process that serves it, the postmaster closes a client's connection. */
void
connection_closed(int fd)
{
	if (fd != taken || fd < 0 || getpid() != postmaster)
		return;
	taken = -1;
	close(taken_by);
}

/* A client that has hung up, in place of the carrier. */
static int
ended_connection(int carrier)
{
	int ends[2];

	close(carrier);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
		return -1;
	close(ends[1]);
	return ends[0];
}

EXPORT int
accept(int listener, __SOCKADDR_ARG address, socklen_t *restrict length)
{
	const socklen_t room = length ? *length : 0;
	const int carrier = NEXT(accept)(listener, address, length);
	struct sockaddr_storage peer;
	socklen_t peer_length;
	int descriptor;

	if (carrier < 0 || !is_handover(listener))
		return carrier;
	descriptor = receive_descriptor(carrier);
	if (descriptor >= 0 && is_connection(descriptor, &peer, &peer_length)
		&& take(carrier)) {
		taken = descriptor;
		taken_by = carrier;
		if (address.__sockaddr__ && length) {
			memcpy(address.__sockaddr__, &peer, room < peer_length ? room : peer_length);
			*length = peer_length;
		}
		return descriptor;
	}
	dprintf(STDERR_FILENO, "boreal shim: %s\n",
			descriptor >= 0 ? "a connection was withdrawn, or was none"
			: "a handover brought no connection");
	if (descriptor >= 0)
		close(descriptor);
	return ended_connection(carrier);
}

/* ---- the lease ------------------------------------------------------------------------------- */

static bool
may_go_on(void)
{
	const uint64_t until = __atomic_load_n(&lease[LEASE_UNTIL], __ATOMIC_ACQUIRE);

	if (until != 0 && (uint64_t) monotonic_ns() >= until)
		return false;
	return __atomic_load_n(&lease[LEASE_DRAINING], __ATOMIC_ACQUIRE) == 0 || in_transaction();
}

bool
is_client(int fd)
{
	struct sockaddr_storage own;
	socklen_t length = sizeof own;

	return getsockname(fd, (struct sockaddr *) &own, &length) == 0
		&& (own.ss_family == AF_INET || own.ss_family == AF_INET6);
}

/*
 * Wait until this session may go on. False if this session ends first: it was told to
 * (pg_terminate_backend, a shutdown), or its postmaster is gone.
 */
static bool
wait_to_go_on(void)
{
	const struct timespec pause = {.tv_nsec = LEASE_POLL_NS};

	while (!may_go_on()) {
		if (*proc_die_pending || (getpid() != postmaster && getppid() != postmaster))
			return false;
		nanosleep(&pause, NULL);	/* PostgreSQL's handlers of signals run meanwhile */
	}
	return true;
}

EXPORT ssize_t
recv(int fd, void *buffer, size_t length, int flags)
{
	const ssize_t got = tls_recv(fd, buffer, length, flags);

	if (got > 0 && lease && !may_go_on() && is_client(fd) && !wait_to_go_on()) {
		errno = ECONNRESET;		/* PostgreSQL looks for interrupts first, and tells the client why */
		return -1;
	}
	return got;
}
