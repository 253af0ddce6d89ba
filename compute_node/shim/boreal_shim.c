/*
 * The page shim: LD_PRELOADed into stock PostgreSQL 16, it makes relation files a cache.
 *
 * Relation files in PGDATA are sparse files of the right length. A block that reads as all zeros
 * is "not here": the shim asks the agent for it over a unix socket and hands PostgreSQL the answer.
 * The protocol is documented in compute_node/page_service.py, its other end.
 *
 * What makes this right:
 *
 *  - A block read through a file opened for writing is read by the buffer manager (md.c opens no
 *    other way), which lets one process at a time read a block and nobody write it meanwhile. So
 *    the page may be stored in the file, and the next read is local. A file opened read-only is
 *    being copied (copydir, init forks, base backups) beside the buffer manager: storing there
 *    could overwrite a newer page, so the copy gets the page and the file stays as it is.
 *  - Every request tells where this PostgreSQL stands: in recovery a page must not come from the
 *    future, so it is read at the replay LSN. For a writer the agent knows the LSN to read at, but
 *    not what was cut off since: every truncation and unlink is reported, and acknowledged, before
 *    it is done.
 *  - What cannot be answered is EIO: never zeros, never a short read. A file that could not be
 *    reported stays, uncut.
 *
 * PostgreSQL is single-threaded, and its signal handlers make none of the wrapped calls. The shim
 * does nothing unless BOREAL_PAGE_SOCKET is set and the program is PostgreSQL.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
	BLOCK_BYTES = 8192,			/* BLCKSZ */
	SEGMENT_BLOCKS = 131072,	/* RELSEG_SIZE */
	MAX_FILES = 65536,
	PATIENCE_MS = 60 * 1000,	/* the agent's own bound is shorter, and names the cause */
	PROTOCOL_MAGIC = 0x31534742 /* "BGS1" */
};

enum tablespace { DEFAULT_TABLESPACE = 1663, GLOBAL_TABLESPACE = 1664 };	/* pg_tablespace.dat */
enum fork { MAIN_FORK = 0, VM_FORK = 2, INIT_FORK = 3 };					/* common/relpath.h */
enum operation { GET_PAGE = 1, CUT = 2 };
enum outcome { FAILED = 0, PAGE = 1, ZEROS = 2, DONE = 3 };

struct relation_file {
	uint32_t tablespace, database, relation, segment;
	uint8_t fork;
	bool tracked;
	bool writable;
};

struct request {
	uint32_t magic;
	uint8_t operation, fork, in_recovery, unused;
	uint32_t tablespace, database, relation, block;
	uint64_t lsn;
};

struct answer {
	uint32_t magic, outcome;
	char page[BLOCK_BYTES];		/* only with PAGE */
};

enum { ANSWER_HEAD_BYTES = offsetof(struct answer, page) };

/* The function of that name that PostgreSQL would have called without us. */
#define NEXT(name) ({ \
	static __typeof__(&name) next; \
	if (!next) next = (__typeof__(&name)) dlsym(RTLD_NEXT, #name); \
	next; })

static bool active;
static struct sockaddr_un agent_address = {.sun_family = AF_UNIX};
static struct relation_file files[MAX_FILES];	/* by file descriptor; forked children inherit both */

static int agent = -1;
static pid_t agent_owner;		/* the process that made the connection; a fork must not share it */

/* PostgreSQL's own (access/xlog.h, access/xlogrecovery.h, storage/pg_shmem.h). */
static bool (*recovery_in_progress)(void);
static uint64_t (*replay_lsn)(uint32_t *timeline);
static uint64_t (*insert_lsn)(void);
static void *const *shared_memory;

static void
die(const char *why)
{
	dprintf(STDERR_FILENO, "boreal shim: %s\n", why);
	_exit(2);
}

/* Have the kernel stop the postmaster when its agent dies: nothing else could tell it in time. */
static void
die_with_agent(const char *parent)
{
	prctl(PR_SET_PDEATHSIG, SIGQUIT);
	if (getppid() != (pid_t) atol(parent))
		die("the agent that started this PostgreSQL is gone");
}

/*
 * PostgreSQL overwrites its environment for the process title: copy what we need before main().
 * Backends are forked, not executed, so of PostgreSQL's processes only the postmaster comes here.
 */
__attribute__((constructor)) static void
start(void)
{
	const char *path = getenv("BOREAL_PAGE_SOCKET"), *parent = getenv("BOREAL_PARENT_PID");

	if (!path || !*path)
		return;
	shared_memory = dlsym(RTLD_DEFAULT, "UsedShmemSegAddr");
	recovery_in_progress = (bool (*)(void)) dlsym(RTLD_DEFAULT, "RecoveryInProgress");
	replay_lsn = (uint64_t (*)(uint32_t *)) dlsym(RTLD_DEFAULT, "GetXLogReplayRecPtr");
	insert_lsn = (uint64_t (*)(void)) dlsym(RTLD_DEFAULT, "GetXLogInsertRecPtr");
	if (!shared_memory && !recovery_in_progress && !replay_lsn && !insert_lsn)
		return;					/* another program, started by PostgreSQL: a shell, cp, ... */
	if (!shared_memory || !recovery_in_progress || !replay_lsn || !insert_lsn)
		die("this PostgreSQL lacks a symbol the shim needs; it is made for version 16");
	if (strlen(path) >= sizeof agent_address.sun_path)
		die("BOREAL_PAGE_SOCKET is too long for a unix socket");
	strcpy(agent_address.sun_path, path);
	if (parent)
		die_with_agent(parent);
	active = true;
}

/* ---- which file is it ------------------------------------------------------------------------ */

static bool
take_word(const char **at, const char *word)
{
	size_t length = strlen(word);

	if (strncmp(*at, word, length) != 0)
		return false;
	*at += length;
	return true;
}

static bool
take_number(const char **at, uint32_t *number)
{
	uint64_t value = 0;
	const char *digit = *at;

	for (; *digit >= '0' && *digit <= '9' && value <= UINT32_MAX; digit++)
		value = value * 10 + (uint64_t) (*digit - '0');
	if (digit == *at || value > UINT32_MAX)
		return false;
	*at = digit;
	*number = (uint32_t) value;
	return true;
}

/*
 * Read base/DATABASE/RELATION[_vm|_init][.SEGMENT] or global/RELATION..., relative to PGDATA.
 * Others are not ours: temporary relations (tN_...), free space maps (the bundle has them), ...
 */
static bool
parse(const char *at, struct relation_file *file)
{
	*file = (struct relation_file) {.tablespace = GLOBAL_TABLESPACE, .tracked = true};
	take_word(&at, "./");
	if (take_word(&at, "base/")) {
		file->tablespace = DEFAULT_TABLESPACE;
		if (!take_number(&at, &file->database) || !take_word(&at, "/"))
			return false;
	} else if (!take_word(&at, "global/"))
		return false;
	if (!take_number(&at, &file->relation))
		return false;
	if (take_word(&at, "_vm"))
		file->fork = VM_FORK;
	else if (take_word(&at, "_init"))
		file->fork = INIT_FORK;
	if (take_word(&at, ".") && !take_number(&at, &file->segment))
		return false;
	return *at == '\0';
}

static struct relation_file *
tracked(int fd)
{
	return fd >= 0 && fd < MAX_FILES && files[fd].tracked ? &files[fd] : NULL;
}

/* ---- asking the agent ------------------------------------------------------------------------ */

static int64_t
now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void
disconnect(void)
{
	if (agent >= 0)
		NEXT(close)(agent);
	agent = -1;
}

static bool
connected(int64_t deadline_ms)
{
	const struct timeval patience = {.tv_sec = PATIENCE_MS / 1000};

	if (agent >= 0 && agent_owner == getpid())
		return true;
	disconnect();
	agent = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (agent < 0)
		return false;
	agent_owner = getpid();
	/* connect() waits while the agent's backlog is full, for as long as a send may. */
	setsockopt(agent, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
	while (connect(agent, (struct sockaddr *) &agent_address, sizeof agent_address) < 0)
		if (errno != EINTR || now_ms() >= deadline_ms)
			return false;
	return true;
}

/* Wait until the agent has sent something; signals meant for PostgreSQL only interrupt the wait. */
static bool
wait_for_answer(int64_t deadline_ms)
{
	struct pollfd readable = {.fd = agent, .events = POLLIN};
	int64_t left_ms;

	while ((left_ms = deadline_ms - now_ms()) > 0) {
		int ready = poll(&readable, 1, (int) left_ms);

		if (ready > 0)
			return true;
		if (ready < 0 && errno != EINTR)
			return false;
	}
	errno = ETIMEDOUT;
	return false;
}

static bool
exchange(const struct request *request, struct answer *answer, int64_t deadline_ms)
{
	size_t have = 0, want = ANSWER_HEAD_BYTES;

	/* One request is under way at a time, and it fits into any socket buffer. */
	if (send(agent, request, sizeof *request, MSG_NOSIGNAL) != sizeof *request)
		return false;
	while (have < want) {
		ssize_t got;

		if (!wait_for_answer(deadline_ms))
			return false;
		got = recv(agent, (char *) answer + have, sizeof *answer - have, MSG_DONTWAIT);
		if (got == 0)
			errno = ECONNRESET;
		if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN))
			return false;
		if (got > 0)
			have += (size_t) got;
		if (have >= ANSWER_HEAD_BYTES && answer->outcome == PAGE)
			want = sizeof *answer;
	}
	if (answer->magic == PROTOCOL_MAGIC && have == want)
		return true;
	errno = EPROTO;
	return false;
}

/*
 * Ask about a block of this segment file. Asks again on a fresh connection once, for the agent may
 * have been restarted. The answer is valid until the next.
 */
static const struct answer *
ask(const struct relation_file *file, enum operation operation, uint64_t block)
{
	static struct answer answer;
	const int64_t deadline_ms = now_ms() + PATIENCE_MS;
	struct request request = {
		.magic = PROTOCOL_MAGIC,
		.operation = (uint8_t) operation,
		.fork = file->fork,
		.tablespace = file->tablespace,
		.database = file->database,
		.relation = file->relation,
		.block = (uint32_t) (block + (uint64_t) file->segment * SEGMENT_BLOCKS),
	};

	answer.outcome = FAILED;
	if (!*shared_memory)
		return &answer;			/* no way to know where PostgreSQL stands */
	request.in_recovery = recovery_in_progress();
	request.lsn = request.in_recovery ? replay_lsn(NULL) : insert_lsn();
	for (int attempt = 0; attempt < 2 && now_ms() < deadline_ms; attempt++) {
		if (connected(deadline_ms) && exchange(&request, &answer, deadline_ms))
			return &answer;
		dprintf(STDERR_FILENO, "boreal shim: no answer from %s about %u/%u/%u block %u: %s\n",
				agent_address.sun_path, request.tablespace, request.database,
				request.relation, request.block, strerror(errno));
		disconnect();
	}
	answer.outcome = FAILED;
	return &answer;
}

/* ---- reads ----------------------------------------------------------------------------------- */

static bool
is_zeros(const char *bytes, size_t length)
{
	/* A page that is here differs in its first bytes, the LSN or pd_lower, so this is cheap. */
	return bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0;
}

/* Keep the page in the file: only a cache, but half a page in it would pass for a whole one. */
static void
store(int fd, const char *page, off_t offset)
{
	static const char zeros[BLOCK_BYTES];
	ssize_t written = NEXT(pwrite)(fd, page, BLOCK_BYTES, offset);

	if (written <= 0 || written == BLOCK_BYTES)
		return;
	if (NEXT(pwrite)(fd, zeros, (size_t) written, offset) != written)
		die("half a page was written into a relation file and cannot be taken back");
}

/* Whether a block of which the caller read only a part is a hole in the file. */
static bool
is_hole(int fd, off_t offset)
{
	static char block[BLOCK_BYTES];

	return NEXT(pread)(fd, block, BLOCK_BYTES, offset) == BLOCK_BYTES
		&& is_zeros(block, BLOCK_BYTES);
}

/* `length` bytes were read at `offset`: put the pages that were not here into the buffer. */
static bool
fill(int fd, const struct relation_file *file, char *buffer, size_t length, off_t offset)
{
	const off_t end = offset + (off_t) length;

	for (off_t block = offset / BLOCK_BYTES; block * BLOCK_BYTES < end; block++) {
		const off_t block_start = block * BLOCK_BYTES;
		const off_t from = offset > block_start ? offset : block_start;
		const off_t to = end < block_start + BLOCK_BYTES ? end : block_start + BLOCK_BYTES;
		const size_t part = (size_t) (to - from);
		const struct answer *answer;

		if (!is_zeros(buffer + (from - offset), part)
			|| (part < BLOCK_BYTES && !is_hole(fd, block_start)))
			continue;
		answer = ask(file, GET_PAGE, (uint64_t) block);
		if (answer->outcome == ZEROS)
			continue;			/* as read */
		if (answer->outcome != PAGE) {
			errno = EIO;
			return false;
		}
		memcpy(buffer + (from - offset), answer->page + (from - block_start), part);
		if (file->writable)
			store(fd, answer->page, block_start);
	}
	return true;
}

EXPORT ssize_t
pread(int fd, void *buffer, size_t length, off_t offset)
{
	const ssize_t got = NEXT(pread)(fd, buffer, length, offset);
	const struct relation_file *file = tracked(fd);

	if (file && got > 0 && !fill(fd, file, buffer, (size_t) got, offset))
		return -1;
	return got;
}

EXPORT ssize_t
read(int fd, void *buffer, size_t length)
{
	const ssize_t got = NEXT(read)(fd, buffer, length);
	const struct relation_file *file = tracked(fd);

	if (file && got > 0
		&& !fill(fd, file, buffer, (size_t) got, lseek(fd, 0, SEEK_CUR) - got))
		return -1;
	return got;
}

/* ---- open and close -------------------------------------------------------------------------- */

EXPORT int
open(const char *path, int flags, ...)
{
	mode_t mode = 0;
	int fd;

	if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {
		va_list rest;

		va_start(rest, flags);
		mode = (mode_t) va_arg(rest, int);
		va_end(rest);
	}
	fd = NEXT(open)(path, flags, mode);
	if (active && fd >= 0) {
		struct relation_file file;
		bool ours = parse(path, &file);

		if (ours && fd >= MAX_FILES) {
			NEXT(close)(fd);
			errno = EMFILE;
			return -1;
		}
		if (ours)
			file.writable = (flags & O_ACCMODE) == O_RDWR;
		if (fd < MAX_FILES)
			files[fd] = ours ? file : (struct relation_file) {0};
	}
	return fd;
}

EXPORT int
close(int fd)
{
	if (tracked(fd))
		files[fd].tracked = false;
	return NEXT(close)(fd);
}

/* ---- cuts ------------------------------------------------------------------------------------ */

/* Tell the agent that the fork loses every block from `length` bytes of this segment on. */
static bool
report_cut(const struct relation_file *file, off_t length)
{
	const uint64_t first = ((uint64_t) length + BLOCK_BYTES - 1) / BLOCK_BYTES;

	if (ask(file, CUT, first)->outcome == DONE)
		return true;
	errno = EIO;
	return false;
}

static bool
report_path_cut(const char *path, off_t length)
{
	struct relation_file file;

	return !active || !parse(path, &file) || report_cut(&file, length);
}

EXPORT int
ftruncate(int fd, off_t length)
{
	const struct relation_file *file = tracked(fd);

	return !file || report_cut(file, length) ? NEXT(ftruncate)(fd, length) : -1;
}

EXPORT int
truncate(const char *path, off_t length)
{
	return report_path_cut(path, length) ? NEXT(truncate)(path, length) : -1;
}

EXPORT int
unlink(const char *path)
{
	return report_path_cut(path, 0) ? NEXT(unlink)(path) : -1;
}
