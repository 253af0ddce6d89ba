/*
 * The shim's part for encryption: the TLS of clients, which this PostgreSQL was built without.
 *
 * A client that wants TLS begins with SSLRequest (chapter 55.2.10 of PostgreSQL's documentation), and
 * a PostgreSQL without OpenSSL answers 'N'. Where the agent gave us a certificate we make that an 'S',
 * do the handshake, and from then on what PostgreSQL receives and sends goes through OpenSSL. It is
 * what be-secure-openssl.c does, at the same two places: below secure_raw_read and secure_raw_write.
 * PostgreSQL itself takes the session for an unencrypted one (pg_stat_ssl, hostssl in pg_hba.conf),
 * and offers no channel binding.
 *
 *  - Only a request that came alone is granted: PostgreSQL refuses a client that sent more before it
 *    was answered ("received unencrypted data after SSL request"), and must go on to do so.
 *  - PostgreSQL tries to receive before it waits for its socket (secure_read), so what OpenSSL has
 *    decrypted and PostgreSQL has not taken yet never waits for more to come.
 *  - A handshake takes as long as authentication_timeout lets it: PostgreSQL's handlers of SIGALRM
 *    and SIGTERM end a process that is still at its startup packet (process_startup_packet_die).
 *  - Whoever speaks TLS needs no certificate: clients prove who they are by their passwords.
 *
 * The library is the system's, found by the agent and loaded when PostgreSQL starts, so that every
 * process it forks has the key in memory, and none needs the files. Its functions and numbers are
 * declared here, since its headers need not be there; they are the same from OpenSSL 1.1.1 on.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shim.h"

/* What we use of OpenSSL: ssl.h, tls1.h and err.h. */
#define OPENSSL_FUNCTIONS(function) \
	function(int, OPENSSL_init_ssl, (uint64_t options, const void *settings)) \
	function(const void *, TLS_server_method, (void)) \
	function(void *, SSL_CTX_new, (const void *method)) \
	function(long, SSL_CTX_ctrl, (void *context, int command, long number, void *pointer)) \
	function(uint64_t, SSL_CTX_set_options, (void *context, uint64_t options)) \
	function(int, SSL_CTX_use_certificate_chain_file, (void *context, const char *path)) \
	function(int, SSL_CTX_use_PrivateKey_file, (void *context, const char *path, int type)) \
	function(int, SSL_CTX_check_private_key, (const void *context)) \
	function(void *, SSL_new, (void *context)) \
	function(void, SSL_free, (void *session)) \
	function(int, SSL_set_fd, (void *session, int fd)) \
	function(int, SSL_accept, (void *session)) \
	function(int, SSL_read, (void *session, void *buffer, int length)) \
	function(int, SSL_write, (void *session, const void *buffer, int length)) \
	function(int, SSL_shutdown, (void *session)) \
	function(int, SSL_get_error, (const void *session, int result)) \
	function(void, ERR_clear_error, (void)) \
	function(unsigned long, ERR_peek_error, (void)) \
	function(const char *, ERR_reason_error_string, (unsigned long code))

static struct {
#define AS_MEMBER(type, name, arguments) type (*name) arguments;
	OPENSSL_FUNCTIONS(AS_MEMBER)
} openssl;

enum {
	SSL_ERROR_SSL = 1, SSL_ERROR_WANT_READ = 2, SSL_ERROR_WANT_WRITE = 3, SSL_ERROR_SYSCALL = 5,
	SSL_ERROR_ZERO_RETURN = 6,
	SSL_FILETYPE_PEM = 1,
	SSL_CTRL_MODE = 33, SSL_CTRL_SET_SESS_CACHE_MODE = 44, SSL_CTRL_SET_MIN_PROTO_VERSION = 123,
	SSL_MODE_ENABLE_PARTIAL_WRITE = 1, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER = 2,
	TLS1_2_VERSION = 0x0303
};
#define OPENSSL_INIT_NO_ATEXIT		UINT64_C(0x00080000)	/* we say goodbye at exit ourselves */
#define SSL_OP_IGNORE_UNEXPECTED_EOF	(UINT64_C(1) << 7)	/* the protocol inside tells its own end */
#define SSL_OP_NO_TICKET		(UINT64_C(1) << 14)			/* no session is resumed, as in PostgreSQL */
#define SSL_OP_NO_RENEGOTIATION		(UINT64_C(1) << 30)

enum { REQUEST_BYTES = 8 };
static const unsigned char tls_request[REQUEST_BYTES] = {0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f};
static const unsigned char gss_request[REQUEST_BYTES] = {0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30};

static void *context;			/* NULL: there is no certificate */

/* This process's client: what it asked for, as far as that is not settled. */
static int client = -1;
static bool settled;
static unsigned char first[REQUEST_BYTES];
static size_t received;			/* of it */
static void *session;			/* NULL: not encrypted */

/* ---- at PostgreSQL's start ------------------------------------------------------------------- */

static const char *
reason(void)
{
	const char *why = openssl.ERR_reason_error_string(openssl.ERR_peek_error());

	return why ? why : "no reason given";
}

static void
die_of_openssl(const char *what)
{
	dprintf(STDERR_FILENO, "boreal shim: %s: %s\n", what, reason());
	_exit(2);
}

static void
load_library(const char *name)
{
	void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);

	if (!library)
		die("OpenSSL cannot be loaded");
#define LOOK_UP(type, name, arguments) \
	openssl.name = (type (*) arguments) dlsym(library, #name); \
	if (!openssl.name) \
		die("this OpenSSL lacks " #name "; it takes version 1.1.1 or later");
	OPENSSL_FUNCTIONS(LOOK_UP)
}

__attribute__((constructor)) static void
start(void)
{
	const char *library = getenv("BOREAL_TLS_LIBRARY");
	const char *certificate = getenv("BOREAL_TLS_CERTIFICATE"), *key = getenv("BOREAL_TLS_KEY");

	if (!dlsym(RTLD_DEFAULT, "UsedShmemSegAddr"))
		return;					/* not PostgreSQL */
	if (!library || !*library)
		return;
	if (!certificate || !key)
		die("there is a library for TLS, but no certificate and key");
	load_library(library);
	openssl.OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, NULL);
	context = openssl.SSL_CTX_new(openssl.TLS_server_method());
	if (!context)
		die_of_openssl("OpenSSL gives no context");
	if (openssl.SSL_CTX_use_certificate_chain_file(context, certificate) != 1
		|| openssl.SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1
		|| openssl.SSL_CTX_check_private_key(context) != 1)
		die_of_openssl("clients cannot be shown the certificate");
	if (openssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_MIN_PROTO_VERSION, TLS1_2_VERSION, NULL) != 1)
		die("this OpenSSL does not know TLS 1.2");
	/* PostgreSQL sends what is left from another place of its buffer. */
	openssl.SSL_CTX_ctrl(context, SSL_CTRL_MODE,
						 SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, NULL);
	openssl.SSL_CTX_ctrl(context, SSL_CTRL_SET_SESS_CACHE_MODE, 0, NULL);
	openssl.SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION
								| SSL_OP_IGNORE_UNEXPECTED_EOF);
}

/* ---- the handshake --------------------------------------------------------------------------- */

/* As PostgreSQL does before it ends: the client learns that nobody cut the connection. */
static void
say_goodbye(void)
{
	openssl.SSL_shutdown(session);
}

static bool
shake_hands(void *fresh)
{
	for (;;) {
		struct pollfd ready = {.fd = client};
		int result;

		openssl.ERR_clear_error();
		result = openssl.SSL_accept(fresh);
		if (result == 1)
			return true;
		switch (openssl.SSL_get_error(fresh, result)) {
			case SSL_ERROR_WANT_READ:
				ready.events = POLLIN;
				break;
			case SSL_ERROR_WANT_WRITE:
				ready.events = POLLOUT;
				break;
			case SSL_ERROR_SSL:
				dprintf(STDERR_FILENO, "boreal shim: no TLS with a client: %s\n", reason());
				return false;
			default:
				return false;	/* it hung up */
		}
		poll(&ready, 1, -1);	/* a signal ends it early; then it is tried once more */
	}
}

/* Grant what was asked for. 1, as if the answer was sent; -1 with errno if there is no connection. */
static ssize_t
grant(void)
{
	const char yes = 'S';
	void *fresh;

	if (NEXT(send)(client, &yes, sizeof yes, MSG_NOSIGNAL) != sizeof yes)
		return -1;
	fresh = openssl.SSL_new(context);
	if (!fresh || openssl.SSL_set_fd(fresh, client) != 1 || !shake_hands(fresh)) {
		openssl.SSL_free(fresh);
		errno = ECONNRESET;
		return -1;
	}
	session = fresh;
	settled = true;
	atexit(say_goodbye);
	return sizeof yes;
}

/* Whether these were the first bytes of the client, and they are no request to be granted. */
static void
look_at(int fd, const unsigned char *data, size_t length)
{
	if (client < 0) {
		client = fd;			/* a process that serves one hears from it first */
		settled = !is_client(fd);
	}
	if (settled || fd != client)
		return;
	if (length <= sizeof first - received)
		memcpy(first + received, data, length);
	received += length;
	if (received > sizeof first
		|| (received == sizeof first && memcmp(first, tls_request, sizeof first) != 0
			&& memcmp(first, gss_request, sizeof first) != 0))
		settled = true;
}

/* ---- what PostgreSQL receives and sends ------------------------------------------------------ */

/* What a call that did nothing tells PostgreSQL. */
static ssize_t
failed(int result)
{
	const int error = errno;

	switch (openssl.SSL_get_error(session, result)) {
		case SSL_ERROR_WANT_READ:
		case SSL_ERROR_WANT_WRITE:
			errno = EWOULDBLOCK;
			return -1;
		case SSL_ERROR_ZERO_RETURN:
			return 0;
		case SSL_ERROR_SYSCALL:
			errno = error ? error : ECONNRESET;
			return -1;
		default:
			errno = ECONNRESET;
			return -1;
	}
}

ssize_t
tls_recv(int fd, void *buffer, size_t length, int flags)
{
	if (session && fd == client) {
		int got;

		openssl.ERR_clear_error();
		errno = 0;
		got = openssl.SSL_read(session, buffer, length > INT_MAX ? INT_MAX : (int) length);
		return got > 0 ? got : failed(got);
	} else {
		const ssize_t got = NEXT(recv)(fd, buffer, length, flags);

		if (got > 0 && context && !settled)
			look_at(fd, buffer, (size_t) got);
		return got;
	}
}

EXPORT ssize_t
send(int fd, const void *buffer, size_t length, int flags)
{
	if (session && fd == client) {
		int sent;

		openssl.ERR_clear_error();
		errno = 0;
		sent = openssl.SSL_write(session, buffer, length > INT_MAX ? INT_MAX : (int) length);
		return sent > 0 ? sent : failed(sent);
	}
	if (fd == client && !settled && received == sizeof first && length == 1) {
		if (memcmp(first, tls_request, sizeof first) == 0)
			return grant();
		received = 0;			/* no GSSAPI: it may ask for TLS next */
	}
	return NEXT(send)(fd, buffer, length, flags);
}
