/*
 * The page shim: LD_PRELOADed into stock PostgreSQL 16, it makes relation files a cache.
 *
 * Relation files in PGDATA are sparse files of the right length. A block that reads as all zeros
 * is "not here": the shim asks the agent for it over a unix socket and hands PostgreSQL the answer.
 * A backend whose misses follow one another gets runs of pages, up to WINDOW_BLOCKS at a time; those
 * it has not come to yet wait in its own memory. The protocol is documented in
 * compute_node/page_service.py, its other end.
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
 *  - What was fetched ahead is never stored before PostgreSQL misses it, and is used only while no
 *    file was cut and no page evicted since it was asked for (`struct losses`). Why it is still the
 *    right version then is argued in compute_node/page_service.py.
 *  - Where the agent evicts pages (compute_node/cache.py), it punches holes into files in use. It
 *    does so under a lock on the blocks, which every write takes too; a read that may have met a
 *    hole half punched is read again under that lock.
 *
 * PostgreSQL is single-threaded, and its signal handlers make none of the wrapped calls. The shim
 * does nothing unless BOREAL_PAGE_SOCKET is set and the program is PostgreSQL.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "shim.h"

enum {
	BLOCK_BYTES = 8192,			/* BLCKSZ */
	SEGMENT_BLOCKS = 131072,	/* RELSEG_SIZE */
	MAX_FILES = 65536,
	PATIENCE_MS = 60 * 1000,	/* the agent's own bound is shorter, and names the cause */
	WINDOW_BLOCKS = 64,			/* the most pages of one answer */
	STREAMS = 4,				/* sequential readers told apart in one process */
	GAP_BLOCKS = 8,				/* a stream may pass over so many blocks without a jump */
	PROTOCOL_MAGIC = 0x32534742 /* "BGS2" */
};

enum tablespace { DEFAULT_TABLESPACE = 1663, GLOBAL_TABLESPACE = 1664 };	/* pg_tablespace.dat */
enum fork { MAIN_FORK = 0, VM_FORK = 2, INIT_FORK = 3 };					/* common/relpath.h */
enum operation { GET_PAGES = 1, CUT = 2, PREFETCH = 3 };
enum outcome { FAILED = 0, PAGES = 1, DONE = 2 };

struct relation_file {
	uint32_t tablespace, database, relation, segment;
	uint8_t fork;
	bool tracked;
	bool writable;
};

struct request {
	uint32_t magic;
	uint8_t operation, fork, in_recovery, count;
	uint32_t tablespace, database, relation, block;
	uint64_t losses, lsn;		/* read in this order */
};

/* With PAGES, `count` of them: bit i of `present` says whether page i follows or is zeros. */
struct answer {
	uint32_t magic;
	uint16_t outcome, count;
	uint64_t present;
};

/* How often pages were taken out of relation files; in a file that the agent and we map. */
struct losses {
	uint64_t evictions;			/* the agent's: odd while it punches */
	uint64_t cuts;				/* ours: after every truncation and unlink */
};

/* A sequential reader, and the last pages it was given. Blocks are counted over the whole fork. */
struct stream {
	struct relation_file file;
	uint64_t began, last;		/* where it reads without a jump: from, up to */
	uint64_t first, present;	/* the pages given */
	uint32_t count, window;		/* given; asked for */
	uint64_t losses, used;		/* the count of losses before it was asked for; when, in ticks */
	char *pages;				/* those present, back to back */
};

static bool active;
static struct sockaddr_un agent_address = {.sun_family = AF_UNIX};
static struct relation_file files[MAX_FILES];	/* by file descriptor; forked children inherit both */

static bool cache_limited;
static struct losses *losses;	/* NULL: nothing is fetched ahead */
static struct stream streams[STREAMS];

static int agent = -1;
static pid_t agent_owner;		/* the process that made the connection; a fork must not share it */

/* PostgreSQL's own (access/xlog.h, access/xlogrecovery.h, storage/pg_shmem.h). */
static bool (*recovery_in_progress)(void);
static uint64_t (*replay_lsn)(uint32_t *timeline);
static uint64_t (*insert_lsn)(void);
static void *const *shared_memory;

/* Have the kernel stop the postmaster when its agent dies: nothing else could tell it in time. */
static void
die_with_agent(const char *parent)
{
	prctl(PR_SET_PDEATHSIG, SIGQUIT);
	if (getppid() != (pid_t) atol(parent))
		die("the agent that started this PostgreSQL is gone");
}

/* The file beside the socket; without it we do without reading ahead. */
static void
map_losses(void)
{
	char path[sizeof agent_address.sun_path + sizeof ".losses"];
	int fd;
	void *at;

	snprintf(path, sizeof path, "%s.losses", agent_address.sun_path);
	fd = NEXT(open)(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	at = mmap(NULL, sizeof *losses, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	NEXT(close)(fd);
	if (at != MAP_FAILED)
		losses = at;
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
	map_losses();
	cache_limited = getenv("BOREAL_CACHE_LIMITED") != NULL;
	if (cache_limited && !losses)
		die("the agent limits the cache, but left no file of losses beside its socket");
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
receive(void *buffer, size_t length, int64_t deadline_ms)
{
	for (size_t have = 0; have < length;) {
		ssize_t got = recv(agent, (char *) buffer + have, length - have, MSG_DONTWAIT);

		if (got > 0)
			have += (size_t) got;
		else if (got == 0) {
			errno = ECONNRESET;
			return false;
		} else if (errno == EAGAIN) {
			if (!wait_for_answer(deadline_ms))
				return false;
		} else if (errno != EINTR)
			return false;
	}
	return true;
}

/* Whether nothing but the answer came: what is left over would pass for the next one. */
static bool
all_received(void)
{
	char more;

	if (recv(agent, &more, 1, MSG_DONTWAIT | MSG_PEEK) < 0 && errno == EAGAIN)
		return true;
	errno = EPROTO;
	return false;
}

/* `pages` has room for as many pages as were asked for. */
static bool
exchange(const struct request *request, struct answer *answer, char *pages, int64_t deadline_ms)
{
	/* One request is under way at a time, and it fits into any socket buffer. */
	if (send(agent, request, sizeof *request, MSG_NOSIGNAL) != sizeof *request
		|| !receive(answer, sizeof *answer, deadline_ms))
		return false;
	errno = EPROTO;
	if (answer->magic != PROTOCOL_MAGIC)
		return false;
	if (answer->outcome == PAGES
		&& (answer->count == 0 || answer->count > request->count
			|| (answer->count < 64 && answer->present >> answer->count != 0)))
		return false;
	return (answer->outcome != PAGES
			|| receive(pages, (size_t) __builtin_popcountll(answer->present) * BLOCK_BYTES,
					   deadline_ms))
		&& all_received();
}

static uint64_t
evictions(void)
{
	return __atomic_load_n(&losses->evictions, __ATOMIC_SEQ_CST);
}

/* Both only grow, so their sum tells whether either did. */
static uint64_t
count_losses(void)
{
	return losses ? evictions() + __atomic_load_n(&losses->cuts, __ATOMIC_SEQ_CST) : 0;
}

/* A request about `count` blocks of the fork; false if we cannot tell where PostgreSQL stands. */
static bool
prepare(struct request *request, const struct relation_file *file, enum operation operation,
		uint64_t block, uint32_t count)
{
	if (!*shared_memory)
		return false;
	*request = (struct request) {
		.magic = PROTOCOL_MAGIC,
		.operation = (uint8_t) operation,
		.fork = file->fork,
		.in_recovery = recovery_in_progress(),
		.count = (uint8_t) count,
		.tablespace = file->tablespace,
		.database = file->database,
		.relation = file->relation,
		.block = (uint32_t) block,
	};
	request->losses = count_losses();
	request->lsn = request->in_recovery ? replay_lsn(NULL) : insert_lsn();
	return true;
}

/*
 * Ask about blocks of this fork. Asks again on a fresh connection once, for the agent may have been
 * restarted. An answer that is no answer is FAILED.
 */
static struct answer
ask(const struct relation_file *file, enum operation operation, uint64_t block, uint32_t count,
	char *pages)
{
	const int64_t deadline_ms = now_ms() + PATIENCE_MS;
	struct answer answer = {.outcome = FAILED};
	struct request request;

	if (!prepare(&request, file, operation, block, count))
		return answer;
	for (int attempt = 0; attempt < 2 && now_ms() < deadline_ms; attempt++) {
		if (connected(deadline_ms) && exchange(&request, &answer, pages, deadline_ms))
			return answer;
		dprintf(STDERR_FILENO, "boreal shim: no answer from %s about %u/%u/%u block %u: %s\n",
				agent_address.sun_path, request.tablespace, request.database,
				request.relation, request.block, strerror(errno));
		disconnect();
	}
	answer.outcome = FAILED;
	return answer;
}

/* ---- pages that are not here ----------------------------------------------------------------- */

static const char zero_page[BLOCK_BYTES];

static bool
same_fork(const struct relation_file *one, const struct relation_file *other)
{
	return one->relation == other->relation && one->database == other->database
		&& one->tablespace == other->tablespace && one->fork == other->fork;
}

static bool
is_near(const struct stream *stream, uint64_t block)
{
	return block >= stream->first && block - stream->first <= stream->count + GAP_BLOCKS;
}

/*
 * The stream that a miss of this block belongs to: the one that has just come here, else one that
 * jumped ahead in the same fork, else a new one.
 */
static struct stream *
stream_of(const struct relation_file *file, uint64_t block)
{
	static uint64_t tick;
	struct stream *oldest = streams, *near = NULL, *behind = NULL, *found;

	for (struct stream *stream = streams; stream < streams + STREAMS; stream++) {
		if (stream->count && same_fork(&stream->file, file)) {
			if (is_near(stream, block))
				near = stream;
			else if (block > stream->first && (!behind || behind->first < stream->first))
				behind = stream;
		}
		if (stream->used < oldest->used)
			oldest = stream;
	}
	found = near ? near : behind ? behind : oldest;
	if (found == oldest && !near && !behind) {
		found->file = *file;
		found->count = found->window = 0;
	}
	found->used = ++tick;
	return found;
}

/* The page in a stream's last answer, unless it has none of it, or pages were lost since. */
static const char *
waiting_page(const struct stream *stream, uint64_t block)
{
	const uint64_t position = block - stream->first;

	if (position >= stream->count || !losses || stream->losses != count_losses())
		return NULL;
	if (!(stream->present >> position & 1))
		return zero_page;
	return stream->pages
		+ __builtin_popcountll(stream->present & ((UINT64_C(1) << position) - 1)) * BLOCK_BYTES;
}

/*
 * Where the next data of a file is, from `offset` on; its end if there is none. Good enough for a
 * guess: blocks that were written with zeros pass for data.
 */
static off_t
next_data(int fd, off_t offset)
{
	const off_t position = lseek(fd, 0, SEEK_CUR);
	off_t data = lseek(fd, offset, SEEK_DATA);

	if (data < 0)
		data = lseek(fd, 0, SEEK_END);
	lseek(fd, position, SEEK_SET);
	return data;
}

/*
 * How many blocks to ask for, as far as they are missing in this file: twice the last time while
 * the stream goes on. After a jump, as many as it read before it: a worker of a parallel scan reads
 * so many blocks, and jumps over those of its fellows; who reads at random reads one.
 */
static uint32_t
window(int fd, struct stream *stream, uint64_t block, off_t offset)
{
	uint64_t count = 1;
	off_t end;

	if (stream->count && is_near(stream, block))
		count = block >= stream->first + stream->count ? 2 * stream->window : stream->window;
	else {
		if (stream->count)
			count = stream->last - stream->began + 1;
		stream->began = block;
	}
	if (count <= 1 || !losses)
		return 1;
	if (count > WINDOW_BLOCKS)
		count = WINDOW_BLOCKS;
	end = next_data(fd, offset + BLOCK_BYTES);
	if (end < offset + (off_t) count * BLOCK_BYTES)
		count = (uint64_t) ((end - offset) / BLOCK_BYTES);
	return count ? (uint32_t) count : 1;
}

static bool
have_room(struct stream *stream)
{
	void *room;

	if (stream->pages)
		return true;
	/* Only what is used of it costs memory. */
	room = mmap(NULL, (size_t) WINDOW_BLOCKS * BLOCK_BYTES, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (room == MAP_FAILED)
		return false;
	stream->pages = room;
	return true;
}

/* The page at `offset` of a segment file, which misses it: NULL if it cannot be had. */
static const char *
missing_page(int fd, const struct relation_file *file, off_t offset)
{
	const uint64_t block =
		(uint64_t) (offset / BLOCK_BYTES) + (uint64_t) file->segment * SEGMENT_BLOCKS;
	struct stream *stream = stream_of(file, block);
	const char *page = stream->count ? waiting_page(stream, block) : NULL;
	struct answer answer;
	uint32_t count;

	if (page || !have_room(stream)) {
		stream->last = block;
		return page;
	}
	count = window(fd, stream, block, offset);
	stream->last = block;
	stream->losses = count_losses();	/* before the request reads where PostgreSQL stands */
	stream->count = 0;					/* until there is a whole answer */
	answer = ask(file, GET_PAGES, block, count, stream->pages);
	if (answer.outcome != PAGES)
		return NULL;
	stream->first = block;
	stream->present = answer.present;
	stream->count = answer.count;
	stream->window = count;
	return answer.present & 1 ? stream->pages : zero_page;
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
	ssize_t written = NEXT(pwrite)(fd, page, BLOCK_BYTES, offset);

	if (written <= 0 || written == BLOCK_BYTES)
		return;
	if (NEXT(pwrite)(fd, zero_page, (size_t) written, offset) != written)
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

	for (off_t block_start = offset - offset % BLOCK_BYTES; block_start < end;
		 block_start += BLOCK_BYTES) {
		const off_t from = offset > block_start ? offset : block_start;
		const off_t to = end < block_start + BLOCK_BYTES ? end : block_start + BLOCK_BYTES;
		const size_t part = (size_t) (to - from);
		const char *page;

		if (!is_zeros(buffer + (from - offset), part)
			|| (part < BLOCK_BYTES && !is_hole(fd, block_start)))
			continue;
		page = missing_page(fd, file, block_start);
		if (!page) {
			errno = EIO;
			return false;
		}
		if (page == zero_page)
			continue;			/* as read */
		memcpy(buffer + (from - offset), page + (from - block_start), part);
		if (file->writable)
			store(fd, page, block_start);
	}
	return true;
}

/* Keep the agent from punching holes into these bytes (F_RDLCK, F_WRLCK), or let it (F_UNLCK). */
static bool
lock(int fd, short how, off_t offset, size_t length)
{
	struct flock range = {
		.l_type = how, .l_whence = SEEK_SET, .l_start = offset, .l_len = (off_t) length
	};

	while (fcntl(fd, F_OFD_SETLKW, &range) < 0)
		if (errno != EINTR)
			return false;
	return true;
}

/*
 * Read what is in a relation file. Beside an eviction a read could find half a page; one that may
 * have is made again, under the lock.
 */
static ssize_t
read_local(int fd, void *buffer, size_t length, off_t offset)
{
	const uint64_t before = cache_limited ? evictions() : 0;
	ssize_t got = NEXT(pread)(fd, buffer, length, offset);
	int error;

	if (!cache_limited || got <= 0 || (before % 2 == 0 && evictions() == before))
		return got;
	if (!lock(fd, F_RDLCK, offset, length))
		return -1;
	got = NEXT(pread)(fd, buffer, length, offset);
	error = errno;
	lock(fd, F_UNLCK, offset, length);
	errno = error;
	return got;
}

EXPORT ssize_t
pread(int fd, void *buffer, size_t length, off_t offset)
{
	const struct relation_file *file = tracked(fd);
	ssize_t got;

	if (!file)
		return NEXT(pread)(fd, buffer, length, offset);
	got = read_local(fd, buffer, length, offset);
	if (got > 0 && !fill(fd, file, buffer, (size_t) got, offset))
		return -1;
	return got;
}

EXPORT ssize_t
read(int fd, void *buffer, size_t length)
{
	const struct relation_file *file = tracked(fd);
	off_t offset;
	ssize_t got;

	if (!file)
		return NEXT(read)(fd, buffer, length);
	offset = lseek(fd, 0, SEEK_CUR);
	got = read_local(fd, buffer, length, offset);
	if (got > 0 && !fill(fd, file, buffer, (size_t) got, offset))
		return -1;
	if (got > 0)
		lseek(fd, offset + got, SEEK_SET);
	return got;
}

/* ---- writes and hints ------------------------------------------------------------------------ */

EXPORT ssize_t
pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
	const bool locked = cache_limited && tracked(fd);
	ssize_t written;
	int error;

	if (locked && !lock(fd, F_WRLCK, offset, length))
		return -1;
	written = NEXT(pwrite)(fd, buffer, length, offset);
	error = errno;
	if (locked)
		lock(fd, F_UNLCK, offset, length);
	errno = error;
	return written;
}

/* Tell the agent that a block will be missed soon. Waits for nothing; a hint may be lost. */
static void
hint(const struct relation_file *file, uint64_t block)
{
	struct request request;
	ssize_t sent;

	if (!prepare(&request, file, PREFETCH, block, 1) || !connected(now_ms() + PATIENCE_MS))
		return;
	sent = send(agent, &request, sizeof request, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent != sizeof request && !(sent < 0 && errno == EAGAIN))
		disconnect();			/* half a request must not be followed by another */
}

EXPORT int
posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
	const struct relation_file *file = tracked(fd);

	/* One block at a time (mdprefetch). Asking where data is, we need not read it. */
	if (file && losses && advice == POSIX_FADV_WILLNEED && length == BLOCK_BYTES) {
		const uint64_t block =
			(uint64_t) (offset / BLOCK_BYTES) + (uint64_t) file->segment * SEGMENT_BLOCKS;

		if (next_data(fd, offset) > offset) {
			hint(file, block);
			return 0;
		}
	}
	return NEXT(posix_fadvise)(fd, offset, length, advice);
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
	connection_closed(fd);
	return NEXT(close)(fd);
}

/* ---- cuts ------------------------------------------------------------------------------------ */

/* Tell the agent that the fork loses every block from `length` bytes of this segment on. */
static bool
report_cut(const struct relation_file *file, off_t length)
{
	const uint64_t first = ((uint64_t) length + BLOCK_BYTES - 1) / BLOCK_BYTES;

	if (ask(file, CUT, first + (uint64_t) file->segment * SEGMENT_BLOCKS, 0, NULL).outcome == DONE)
		return true;
	errno = EIO;
	return false;
}

/* After the cut: what anybody fetched before it is void. Before it, no new block can be there. */
static int
cut(int result)
{
	const int error = errno;

	if (losses)
		__atomic_fetch_add(&losses->cuts, 1, __ATOMIC_SEQ_CST);
	errno = error;
	return result;
}

static bool
is_relation_path(const char *path, struct relation_file *file)
{
	return active && parse(path, file);
}

EXPORT int
ftruncate(int fd, off_t length)
{
	const struct relation_file *file = tracked(fd);

	if (!file)
		return NEXT(ftruncate)(fd, length);
	return report_cut(file, length) ? cut(NEXT(ftruncate)(fd, length)) : -1;
}

EXPORT int
truncate(const char *path, off_t length)
{
	struct relation_file file;

	if (!is_relation_path(path, &file))
		return NEXT(truncate)(path, length);
	return report_cut(&file, length) ? cut(NEXT(truncate)(path, length)) : -1;
}

EXPORT int
unlink(const char *path)
{
	struct relation_file file;

	if (!is_relation_path(path, &file))
		return NEXT(unlink)(path);
	return report_cut(&file, 0) ? cut(NEXT(unlink)(path)) : -1;
}
