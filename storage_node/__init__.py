"""A storage node: one segment (replica) of each volume, as a log process and a page process.

The log process (`__main__`) makes redo durable and answers for it; the page process
(`page_process`) indexes the log and materializes pages. They share files, never a lock.
"""
