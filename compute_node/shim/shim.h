/* What the shim's parts share. */
#ifndef BOREAL_SHIM_H
#define BOREAL_SHIM_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* The function of that name that PostgreSQL would have called without us. */
#define NEXT(name) ({ \
	static __typeof__(&name) next; \
	if (!next) next = (__typeof__(&name)) dlsym(RTLD_NEXT, #name); \
	next; })

/* Only while PostgreSQL starts, or where going on would spoil its files. */
static inline void
die(const char *why)
{
	dprintf(STDERR_FILENO, "boreal shim: %s\n", why);
	_exit(2);
}

static inline int64_t
monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t
now_ms(void)
{
	return monotonic_ns() / 1000000;
}

/* PostgreSQL closes a file descriptor (connections.c). */
void connection_closed(int fd);

/* Whether it is a connection over TCP: the agent's own are not (connections.c). */
bool is_client(int fd);

/* recv(), of what the peer meant (tls.c). */
ssize_t tls_recv(int fd, void *buffer, size_t length, int flags);

#endif
